"""Compiled programs: kept on disk between runs, and counted."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache


@dataclasses.dataclass
class Compilations:
    """What XLA compiled, or found in the cache, since `counted_compilations` was entered."""

    cache_dir: str = ""  # '' = nothing is kept
    hits: int = 0  # programs read from the cache
    misses: int = 0  # programs compiled and put there
    programs: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # name -> seconds of each

    @property
    def seconds(self) -> float:
        """Seconds of all compilations and cache readings."""
        return sum(sum(seconds) for seconds in self.programs.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for `result.json`."""
        slowest_first = sorted(self.programs.items(), key=lambda item: -sum(item[1]))
        return {
            "cache_dir": self.cache_dir,
            "cache_hits": self.hits,
            "cache_misses": self.misses,
            "seconds": round(self.seconds, 3),
            "programs": {name: [round(s, 3) for s in seconds] for name, seconds in slowest_first},
        }


@contextlib.contextmanager
def counted_compilations(cache_dir: Path | None) -> Iterator[Compilations]:
    """Count compilations inside the `with`, and keep the programs in `cache_dir` for the next process.

    A cache that was chosen before (`JAX_COMPILATION_CACHE_DIR`, or `jax.config`) is left in place.

    Args:
        cache_dir: made when the first program is kept; None = keep nothing.
    """
    before, least = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    chosen = before or (str(cache_dir) if cache_dir is not None else "")
    counted = Compilations(cache_dir=chosen)

    def on_event(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            counted.hits += 1
        elif event == "/jax/compilation_cache/cache_misses":
            counted.misses += 1

    def on_duration(event: str, seconds: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            name = str(about.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
            counted.programs.setdefault(name, []).append(seconds)

    if chosen != before:
        jax.config.update("jax_compilation_cache_dir", chosen)
        # A small model's programs take less than JAX's threshold of one second, and are its whole start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", min(least, 0.1))
        jax_cache.reset_cache()  # JAX opens its cache once; without this a second directory would be ignored
    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_listener(on_event)
        jax.monitoring.unregister_event_duration_listener(on_duration)
        if chosen != before:
            jax.config.update("jax_compilation_cache_dir", before)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
            jax_cache.reset_cache()
