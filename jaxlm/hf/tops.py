"""What stands on top of a model in the classes of `transformers` that many families have."""

from collections.abc import Callable, Mapping

from jaxlm.hf.family import Fields, HFConfig, Top, labels
from jaxlm.hf.packing import Packing, linear, same
from jaxlm.model.config import TransformerConfig


def lm(hf: HFConfig) -> Fields:
    """An encoder's head over the vocabulary."""
    return {"head_transform": True, "head_bias": True, "tie_embeddings": hf.get("tie_word_embeddings", True)}


def classes(name: str) -> dict[str, Packing]:
    """The linear layer that gives the logits of the classes."""
    return {f"{name}.weight": linear("classifier/w"), f"{name}.bias": same("classifier/b")}


def pooler(name: str) -> dict[str, Packing]:
    """The dense layer before it."""
    return {f"{name}.weight": linear("pooler/w"), f"{name}.bias": same("pooler/b")}


def vocabulary(dense: str, norm: str, matrix: str) -> dict[str, Packing]:
    """An encoder's head over the vocabulary but for its bias; a tied one has the table for a matrix."""
    return {
        f"{matrix}.weight": linear("head/w"),
        f"{dense}.weight": linear("transform/w"),
        f"{dense}.bias": same("transform/b"),
        f"{norm}.weight": same("transform_norm/scale"),
        f"{norm}.bias": same("transform_norm/bias"),
    }


def vocabulary_bias(tied: str, untied: str) -> Callable[[TransformerConfig], dict[str, Packing]]:
    """Its bias, whose name depends on whether the matrix is tied."""
    return lambda cfg: {tied if cfg.tie_embeddings else untied: same("head/b")}


def pooled(name: str) -> Top:
    """An encoder with a pooler, unless config.json says that there is none."""
    dense = lambda hf: "tanh" if hf.get("add_pooling_layer", True) else ""  # noqa: E731
    return Top("", lambda hf: {"readout.dense": dense(hf)}, pooler(name))


def rows(
    tensors: Mapping[str, Packing],
    *,
    of: str = "first",
    dense: str = "",
    bias: bool = True,
    number: int = 0,
    pairs: bool = False,
) -> Top:
    """Classes of a row (or of each token), as many as config.json has labels or a given number."""

    def read(hf: HFConfig) -> Fields:
        fields = {"readout.of": of, "readout.dense": dense, "readout.bias": bias}
        return {**fields, "readout.classes": number or labels(hf)}

    return Top("classes", read, tensors, pairs=pairs)


def tokens(name: str = "classifier") -> Top:
    """Classes of each token."""
    return rows(classes(name), of="each")


def with_vocabulary(top: Top, head: Mapping[str, Packing]) -> Top:
    """Both a head over the vocabulary, whose logits are called so, and another."""
    return Top("vocabulary", lambda hf: {**top.read(hf), **lm(hf)}, {**top.tensors, **head}, pairs=top.pairs)


def encoder_tops(
    name: str, *, head: Mapping[str, Packing], sequence: Top, model: Top | None = None, **more: Top
) -> dict[str, Top]:
    """The classes of an encoder; `more` are called by the ends of their names."""
    return {
        f"{name}ForMaskedLM": Top("vocabulary", lm, head),
        f"{name}ForSequenceClassification": sequence,
        f"{name}ForTokenClassification": tokens(),
        f"{name}ForQuestionAnswering": tokens("qa_outputs"),
        f"{name}Model": model or Top(),
        **{f"{name}{end}": top for end, top in more.items()},
    }


def decoder_tops(architecture: str, token: str, *, stem: str = "") -> dict[str, Top]:
    """The classes of a decoder, which speaks of a row by its last token.

    Args:
        architecture: its language model.
        token: the name of the layer with the classes of each token.
        stem: how the names of the others begin; '' = as the language model's.
    """
    name = stem or architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    headless = {"tie_embeddings": True, "head_bias": False}

    def over(top: Top) -> Top:
        return Top(top.logits, lambda hf: {**top.read(hf), **headless}, top.tensors)

    return {
        architecture: Top("vocabulary"),
        f"{name}ForSequenceClassification": over(rows(classes("score"), of="last", bias=False)),
        f"{name}ForTokenClassification": over(tokens(token)),
        f"{name}Model": over(Top()),
    }
