"""Samples along the way: which prompts fit the model, and what is written."""

from types import SimpleNamespace

import pytest

from jaxlm.errors import UserError
from jaxlm.generate.sampling import SampleConfig
from jaxlm.train.periodic import Samples


def generator(encode):
    """One that knows 8 positions, a token a letter, and answers every prompt alike."""
    return SimpleNamespace(
        model=SimpleNamespace(max_length=8, encode=encode),
        tokenizer=SimpleNamespace(encode=list),
        generate_text=lambda params, prompts, cfg: [SimpleNamespace(text="yes") for _ in prompts],
    )


@pytest.mark.parametrize(("encode", "written"), [(None, "abcyes"), (len, "abc -> yes")])
def test_what_a_model_reads_stands_apart_from_what_it_says(tmp_path, encode, written):
    samples = Samples(tmp_path / "s.txt", generator(encode), ["abc"], SampleConfig(max_new_tokens=4), 0)
    samples(7, SimpleNamespace(params=None))
    assert (tmp_path / "s.txt").read_text() == f"##### step 7\n{written}\n\n"


def test_a_prompt_that_does_not_fit_is_refused_at_the_start(tmp_path):
    """A decoder continues its prompt in the same positions; an encoder has them for itself."""
    for encode, prompt, new in ((None, "abcd", 4), (len, "abcdefgh", 4), (len, "abc", 8)):
        with pytest.raises(UserError, match="do not fit the model's 8 positions"):
            Samples(tmp_path / "s.txt", generator(encode), [prompt], SampleConfig(max_new_tokens=new), 0)
    Samples(tmp_path / "s.txt", generator(len), ["abcdefg"], SampleConfig(max_new_tokens=7), 0)
