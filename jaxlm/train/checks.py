"""What the parts of a run ask of each other, before any work is spent."""

from jaxlm.config import RunConfig
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
