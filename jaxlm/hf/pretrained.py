"""A checkpoint as a model to call: numpy arrays in and out, shaped as those of `transformers`."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxlm.errors import UserError, check
from jaxlm.generate.sampling import SampleConfig
from jaxlm.hf.calls import (
    Ids,
    Settings,
    beside,
    continued,
    counted,
    generators,
    ids_of,
    masked,
    streams,
    unpadded,
)
from jaxlm.hf.families import family_of
from jaxlm.hf.family import Family, read_config, write_config
from jaxlm.hf.files import Source, open_folder, read_json, write_folder
from jaxlm.hf.gguf_files import open_gguf
from jaxlm.hf.mxfp4 import unpacked
from jaxlm.hf.seq2seq import Seq2Seq
from jaxlm.hf.transfer import read_params, settled, tensors_of
from jaxlm.model import heads, transformer
from jaxlm.model.config import TransformerConfig
from jaxlm.sharding import Layout, use

_GENERATION = "generation_config.json"


@contextlib.contextmanager
def open_checkpoint(path: str | Path) -> Iterator[Source]:
    """The checkpoint at a path, opened for reading.

    Raises:
        UserError: nothing there that can be read.
    """
    path = Path(path)
    if not path.is_dir() and path.suffix != ".gguf":
        raise UserError(f"{path} is neither a folder with config.json and safetensors nor a .gguf file")
    check(path.exists(), f"{path} does not exist")
    with open_folder(path) if path.is_dir() else open_gguf(path) as source:
        yield unpacked(source) if source.config.get("quantization_config") else source


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str = "",
    layout: Layout | None = None,
) -> "Pretrained | Seq2Seq":
    """The model of a Hugging Face folder or of a GGUF file.

    Args:
        path: folder with config.json and safetensors, or a llama's `*.gguf`.
        dtype: in which it computes.
        param_dtype: in which the weights are kept; '' = as in the files.
        layout: mesh and rules to spread it over; None = the first device.

    Returns:
        A `Seq2Seq` if the model has an encoder, else a `Pretrained`.

    Raises:
        UserError: a family or an option that this library does not have; tensors that are missing, surplus or
            misshapen.
    """
    with open_checkpoint(path) as source:
        family = family_of(source.config)
        config = settled(family, source)
        cfg = dataclasses.replace(
            read_config(family, config), dtype=dtype, param_dtype=param_dtype or source.dtype
        )
        params, left = read_params(cfg, family, source, layout=layout)
        file = Path(path) / _GENERATION
        generation = read_json(file) if file.is_file() else {}
        kind = Seq2Seq if cfg.has_encoder else Pretrained
        return kind(cfg, params, family, config, layout, generation, left)


def save(model: "Pretrained | Seq2Seq", folder: str | Path, *, dtype: str = "") -> None:
    """Write a model as a folder that `transformers` loads.

    Args:
        model: what `load` gave, or any parameters with a family and the config.json to start from.
        folder: made if it is not there.
        dtype: of the weights; '' = as they are kept.

    Raises:
        UserError: the family cannot express the model.
    """
    config = write_config(model.family, model.cfg, model.config)
    spelling = "torch_dtype" if "torch_dtype" in config else "dtype"
    prefix = model.family.prefix if config["architectures"][0] in model.family.bare else ""
    tensors = tensors_of(model.cfg, model.family.topped(config), model.params, dtype=dtype)
    write_folder(
        Path(folder),
        {**config, spelling: dtype or model.cfg.param_dtype},
        {name.removeprefix(prefix): (shape, make) for name, shape, make in tensors},
        itemsize=np.dtype(dtype or model.cfg.param_dtype).itemsize,
    )
    if model.generation:
        (Path(folder) / _GENERATION).write_text(json.dumps(dict(model.generation), indent=2) + "\n")


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A loaded model. Rows may be padded on either side; what comes out of padded columns means nothing."""

    cfg: TransformerConfig
    params: Any
    family: Family
    config: dict[str, Any]  # its config.json
    layout: Layout | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its generation_config.json
    left: tuple[str, ...] = ()  # tensors of heads in its files that its class does not have

    def logits(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        position_ids: Ids | None = None,
        token_type_ids: Ids | None = None,
    ) -> Float[np.ndarray, "B T V"]:
        """What `transformers` calls logits, float32: those of the vocabulary, or a classifier's.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 = a token, 0 = padding; default all tokens.
            position_ids: [B, T]; default: tokens of a row are counted from 0, padding is not.
            token_type_ids: [B, T], of models that have them; default 0.

        Returns:
            [B, T, V] after every token; of a class that says something else, what `class_logits` or
            `token_logits` returns.

        Raises:
            UserError: arrays of different shapes, or a model without a head.
        """
        inputs = (input_ids, attention_mask, position_ids, token_type_ids)
        if self.family.top.logits == "classes":
            return self._class_logits(*inputs)
        check(
            bool(self.family.top.logits),
            f"{self.family.architecture} has no head: use hidden_states, mean_pooled or last_pooled",
        )
        with use(self.layout):
            return np.array(self._logits(self.params, *_inputs(*inputs)))

    def class_logits(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
    ) -> Float[np.ndarray, "B C"]:
        """Logits of the classes of each row; arguments as for `logits`.

        Raises:
            UserError: a model without classes of rows.
        """
        has = self.cfg.readout.classes > 0 and self.cfg.readout.of != "each"
        check(has, f"{self.family.architecture} has no classes of rows")
        return self._class_logits(input_ids, attention_mask, position_ids, token_type_ids)

    def token_logits(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
    ) -> Float[np.ndarray, "B T ..."]:
        """Logits of the classes of each token, [B, T, C]; [B, T] of a detector of replaced tokens.

        Raises:
            UserError: a model without classes of tokens.
        """
        has = self.cfg.readout.classes > 0 and self.cfg.readout.of == "each"
        check(has, f"{self.family.architecture} has no classes of tokens")
        return self._class_logits(input_ids, attention_mask, position_ids, token_type_ids)

    def next_sentence_logits(
        self, input_ids: Ids, attention_mask: Ids | None = None, token_type_ids: Ids | None = None
    ) -> Float[np.ndarray, "B 2"]:
        """Whether the second sentence follows the first (0) or not (1), or stands before it (ALBERT's 1).

        Raises:
            UserError: a class that says nothing about pairs of sentences.
        """
        check(self.family.top.pairs, f"{self.family.architecture} says nothing about pairs of sentences")
        return self.class_logits(input_ids, attention_mask, token_type_ids)

    def hidden_states(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        position_ids: Ids | None = None,
        token_type_ids: Ids | None = None,
    ) -> tuple[Float[np.ndarray, "B T D"], ...]:
        """L + 1 arrays: the embeddings, then the stream after each layer, the last one after the last norm.

        Arguments as for `logits`; these are the `hidden_states` of `transformers`.
        """
        with use(self.layout):
            states = self._states(
                self.params, *_inputs(input_ids, attention_mask, position_ids, token_type_ids)
            )
        return tuple(np.array(x) for x in states)

    def pooled(
        self, input_ids: Ids, attention_mask: Ids | None = None, token_type_ids: Ids | None = None
    ) -> Float[np.ndarray, "B D"]:
        """What BERT's pooler makes of the first token."""
        check(bool(self.cfg.readout.dense), f"{self.family.architecture} has no pooler")
        with use(self.layout):
            inputs = _inputs(input_ids, attention_mask, None, token_type_ids)
            return np.array(self._pooled(self.params, *inputs))[:, 0]

    def mean_pooled(
        self, input_ids: Ids, attention_mask: Ids | None = None, token_type_ids: Ids | None = None
    ) -> Float[np.ndarray, "B D"]:
        """The mean of the last hidden states over each row's tokens: an embedding of a sentence."""
        return self._taken("mean", input_ids, attention_mask, token_type_ids)

    def last_pooled(
        self, input_ids: Ids, attention_mask: Ids | None = None, token_type_ids: Ids | None = None
    ) -> Float[np.ndarray, "B D"]:
        """The last hidden state of each row's last token: a decoder's embedding of a sentence."""
        return self._taken("last", input_ids, attention_mask, token_type_ids)

    def _taken(self, of: str, ids: Ids, mask: Ids | None, types: Ids | None) -> np.ndarray:
        last_BTD = self.hidden_states(ids, mask, None, types)[-1]
        segments_BT = None if mask is None else jnp.asarray(mask)
        return np.array(heads.taken(of, jnp.asarray(last_BTD), segments_BT))[:, 0]

    def generate(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float | None = None,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Int[np.ndarray, "B S"]:
        """The prompts as they were given, with what follows them.

        Token ids and the penalty that are not given are those of generation_config.json, without one of
        config.json; so are `suppress_tokens` and `bad_words_ids` of one token, which are never drawn. Other
        settings there (beams, whether to draw) are not read.

        Args:
            input_ids, attention_mask: as for `logits`.
            max_new_tokens: a row ends after as many, or with an end token.
            temperature: 0 = greedy.
            top_k, top_p: see `SampleConfig`.
            repetition_penalty: of tokens of prompt and text; 1 = none.
            seed: row i draws with seed + i.
            eos_token_id: end tokens; () = none.
            pad_token_id: fills rows that ended; without any the first end token, else 0.

        Returns:
            [B, T + n], n = the longest continuation.

        Raises:
            UserError: `bad_words_ids` of several tokens.
        """
        settings = Settings(self.generation, self.config)
        eos = settings.several("eos_token_id", eos_token_id)
        sample = SampleConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=settings.penalty(repetition_penalty),
            seed=seed,
        )
        rows = unpadded(*masked(input_ids, attention_mask))
        results = self._generator(eos, settings.banned()).generate(self.params, rows, sample)
        new = [result.tokens for result in results]
        return continued(ids_of(input_ids), new, settings.pad(pad_token_id, eos))

    @functools.cached_property
    def _logits(self) -> Any:
        cfg = self.cfg

        def logits(params: Any, ids_BT: Any, *inputs_BT: Any) -> jax.Array:
            hidden_BTD, _, _ = transformer.apply(cfg, params, ids_BT, **_where(*inputs_BT))
            return transformer.unembed(cfg, params, hidden_BTD)

        return jax.jit(logits)

    def _class_logits(self, *inputs: Any) -> np.ndarray:
        with use(self.layout):
            logits = np.array(self._classes(self.params, *_inputs(*inputs)))
        return logits[..., 0] if self.family.top.flat else logits

    @functools.cached_property
    def _classes(self) -> Any:
        return self._head(heads.class_logits)

    @functools.cached_property
    def _pooled(self) -> Any:
        return self._head(heads.pool)

    def _head(self, head: Any) -> Any:
        cfg = self.cfg

        def run(params: Any, ids_BT: Any, *inputs_BT: Any) -> jax.Array:
            where = _where(*inputs_BT)
            hidden_BTD, _, _ = transformer.apply(cfg, params, ids_BT, **where)
            return head(cfg, params, hidden_BTD, where["segments_BT"])

        return jax.jit(run)

    @functools.cached_property
    def _states(self) -> Any:
        cfg = self.cfg

        def states(params: Any, ids_BT: Any, *inputs_BT: Any) -> list[jax.Array]:
            return streams(cfg, params, ids_BT, **_where(*inputs_BT))

        return jax.jit(states)

    @functools.cached_property
    def _generator(self) -> Any:
        return generators(self.cfg, self.layout)


def _inputs(
    ids: Any, mask: Any = None, positions: Any = None, types: Any = None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    ids = ids_of(ids)
    named = (("attention_mask", mask), ("position_ids", positions), ("token_type_ids", types))
    mask, positions, types = (beside(ids, x, name) for name, x in named)
    return ids, mask, positions, types


def _where(
    mask_BT: jax.Array | None, positions_BT: jax.Array | None, types_BT: jax.Array | None
) -> dict[str, jax.Array | None]:
    """Documents and positions of rows that may be padded on either side."""
    if mask_BT is not None and positions_BT is None:
        positions_BT = counted(mask_BT)
    return {"segments_BT": mask_BT, "positions_BT": positions_BT, "types_BT": types_BT}
