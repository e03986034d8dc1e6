"""What the parts of a run ask of each other, before any work is spent."""

from jaxlm.config import RunConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError, check
from jaxlm.model.config import TransformerConfig
from jaxlm.model.models import check_row
from jaxlm.objectives.formats import check_model
from jaxlm.sharding import Layout


def check_shapes(cfg: RunConfig, layout: Layout) -> None:
    """What no room can see alone: does the batch fit the mesh, and a row the model."""
    check_model(cfg.model, cfg.data)
    check(
        cfg.data.format == "lm" or cfg.data.facts.encoder or not cfg.train.sample_prompts,
        f"train.sample_prompts={cfg.train.sample_prompts}, but data.format={cfg.data.format!r} makes no "
        "model that writes text; set train.sample_prompts=()",
    )
    B, M, multiple = cfg.data.batch_size, cfg.train.microbatches, layout.row_multiple
    if B % (M * multiple):
        parts, step = layout.pipeline_parts, M * multiple
        pipe = f"{parts} microbatches in the pipeline x " if layout.stages > 1 else ""
        raise UserError(
            f"data.batch_size={B} is not divisible by train.microbatches={M} x {pipe}{multiple // parts} "
            f"mesh devices that share the rows; the nearest that is: {max(step, round(B / step) * step)}"
        )
    check(
        layout.offload != "all" or (isinstance(cfg.model, TransformerConfig) and cfg.model.scan),
        "mesh.offload='all' fetches the layers of a scan; use it with model.scan=True, or 'optimizer'",
    )
    check_row(cfg.model, cfg.data.seq_len, cfg.data.input_len, layout)
    rounds = cfg.model.moe.rounds if isinstance(cfg.model, TransformerConfig) else 1
    columns = layout.size(layout.mesh_axes("length", compute=True))
    tokens = B // (M * multiple) * (cfg.data.seq_len // columns)
    if tokens % rounds:
        divisors = [n for n in range(1, tokens + 1) if tokens % n == 0]
        raise UserError(
            f"model.moe.rounds={rounds} does not divide the {tokens} tokens of a device in one pass; the "
            f"nearest that does: {min(divisors, key=lambda n: abs(n - rounds))}"
        )


def check_tokens(cfg: RunConfig, tokenizer: Tokenizer) -> None:
    """What the rows of the data ask of the tokenizer's own tokens."""
    check(
        not cfg.data.with_bos or tokenizer.bos_id != tokenizer.eos_id,
        f"data.with_bos=True, but the tokenizer {cfg.data.tokenizer!r} has one token, {tokenizer.eos_id}, "
        "for the beginning and the end: every text would end with its first token; set data.with_bos=False",
    )
