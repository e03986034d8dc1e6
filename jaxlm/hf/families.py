"""All families by the model_type of their config.json."""

import dataclasses

from jaxlm.errors import UserError, nearest
from jaxlm.hf import (
    bert_like,
    bert_variants,
    expert_variants,
    gpt_like,
    gpt_variants,
    llama_like,
    llama_variants,
    seq2seq_like,
)
from jaxlm.hf.family import Family, HFConfig
from jaxlm.hf.tops import decoder_tops

# Decoders whose layer with the classes of each token is called `classifier`, and not `score`.
_CLASSIFIERS = ("gpt2", "gpt_neo", "gpt_neox", "bloom", "mpt", "falcon")

_STEMS = {"gemma3_text": "Gemma3Text"}  # of classes that are not called as the language model is


def _topped(family: Family) -> Family:
    """With the tops of a decoder, if it is one; files of a model without a head lack the prefix."""
    tops = family.tops
    if not tops and family.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        token = "classifier" if family.model_type in _CLASSIFIERS else "score"
        stem = _STEMS.get(family.model_type, "")
        tops = decoder_tops(family.architecture, token, stem=stem)
    bare = (*family.bare, *(name for name, top in tops.items() if not top.logits))
    return dataclasses.replace(family, tops=tops, bare=bare)


FAMILIES: dict[str, Family] = {
    family.model_type: _topped(family)
    for room in (
        llama_like,
        llama_variants,
        expert_variants,
        gpt_like,
        gpt_variants,
        bert_like,
        bert_variants,
        seq2seq_like,
    )
    for family in room.FAMILIES
}


def family_of(hf: HFConfig) -> Family:
    """The family of a config.json, with the class that it names on top.

    Raises:
        UserError: there is no such family, or it has no such class; the message lists those there are.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        listed = ", ".join(sorted(FAMILIES))
        raise UserError(f"config.json: model_type={kind!r} is not one of {listed}{nearest(kind, FAMILIES)}")
    return FAMILIES[kind].topped(hf)
