"""Work beside the updates that needs a memory of its own: samples on disk, a window of profiled steps."""

import re
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxlm.data.config import DataConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import check
from jaxlm.generate.decode import Generator
from jaxlm.generate.decoder import decoder
from jaxlm.generate.sampling import SampleConfig
from jaxlm.model.models import ModelConfig
from jaxlm.sharding import Layout
from jaxlm.train.loop import Every
from jaxlm.train.rundir import write_text
from jaxlm.train.state import TrainState


def text_generator(
    model: ModelConfig, data: DataConfig, tokenizer: Tokenizer, layout: Layout | None
) -> Generator:
    """A generator that frames texts as the rows of `data` are."""
    start = getattr(tokenizer, f"{data.decoder_start}_id")
    return Generator(decoder(model), tokenizer, layout=layout, start_id=start, with_bos=data.with_bos)


class Samples:
    """Texts that the model writes along the way, appended to a file under the number of the step.

    With several processes all of them take part in the writing; those without a path keep nothing.
    """

    def __init__(
        self, path: Path | None, generator: Generator, prompts: Sequence[str], cfg: SampleConfig, start: int
    ) -> None:
        self._path, self._generator, self._prompts, self._cfg = path, generator, prompts, cfg
        room = generator.model.max_length
        for prompt in prompts:
            length = 1 + len(generator.tokenizer.encode(prompt))
            new = cfg.max_new_tokens
            fits = max(length, 1 + new) if generator.model.encode else length + new
            check(
                not room or fits <= room,
                f"train.sample_prompts: {prompt!r} is {length} tokens, which with sample.max_new_tokens="
                f"{cfg.max_new_tokens} do not fit the model's {room} positions",
            )
        if path is None:
            return
        # Like the metrics: what lies past the checkpoint will be written again.
        kept = [text for step, text in self._blocks() if step <= start] if start else []
        write_text(path, "".join(kept))

    def _blocks(self) -> list[tuple[int, str]]:
        if not self._path.exists():
            return []
        parts = re.split(r"(?m)^(?=##### step \d+$)", self._path.read_text())
        return [(int(part.split("\n", 1)[0].split()[2]), part) for part in parts if part.strip()]

    def __call__(self, step: int, state: TrainState) -> None:
        results = self._generator.generate_text(state.params, self._prompts, self._cfg)
        if self._path is None:
            return
        between = " -> " if self._generator.model.encode else ""
        pairs = zip(self._prompts, results, strict=True)
        texts = [f"{prompt}{between}{result.text}\n" for prompt, result in pairs]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"##### step {step}\n" + "\n-----\n".join(texts) + "\n")


class Profile:
    """A window of steps under `jax.profiler`; open the directory in TensorBoard or Perfetto."""

    def __init__(self, directory: Path, start: int, steps: int) -> None:
        self._directory, self._first, self._last = directory, start, start + steps
        self._running = False

    def jobs(self) -> list[Every]:
        """Start and stop as periodic work; both wait for the device, so the window holds whole steps."""
        return [
            Every(self._first, self._start, "profile", cause="profile"),
            Every(self._last, self._stop, "profile", last=True, stop=True, cause="profile"),
        ]

    def _start(self, step: int, state: TrainState) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def _stop(self, step: int, state: TrainState) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
