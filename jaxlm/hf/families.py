"""All families by the model_type of their config.json."""

from jaxlm.errors import UserError, nearest
from jaxlm.hf import bert_like, gpt_like, gpt_variants, llama_like, llama_variants
from jaxlm.hf.family import Family, HFConfig

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for room in (llama_like, llama_variants, gpt_like, gpt_variants, bert_like)
    for family in room.FAMILIES
}


def family_of(hf: HFConfig) -> Family:
    """The family of a config.json.

    Raises:
        UserError: there is no such family; the message lists those there are.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        listed = ", ".join(sorted(FAMILIES))
        raise UserError(f"config.json: model_type={kind!r} is not one of {listed}{nearest(kind, FAMILIES)}")
    return FAMILIES[kind]
