"""Interchange: what is loaded computes what the original does; what cannot be is refused."""

import json
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from gptcore.__main__ import main
from gptcore.checkpoint import open_checkpoint
from gptcore.config import ConfigError, GPTConfig
from gptcore.flags import parse_settings
from gptcore.interop import (
    export_model,
    import_model,
    load_nanogpt,
    load_notebook,
    load_transformers,
    save_notebook,
    save_transformers,
)
from gptcore.model import GPT
from gptcore.naive import NaiveGPT
from gptcore.tokenizer import CharTokenizer
from gptcore.trainer import prepare
from kernels.verify import compare

V, S, C, H, L = 11, 8, 16, 2, 2
TINY = GPTConfig(
    vocab_size=V, block_size=S, n_layer=L, n_head=H, n_embd=C, dropout=0.0, backend="eager"
)
IDX = torch.randint(V, (3, S), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def randomise(module, seed=0):
    """Every parameter normal, so that none can be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def assert_same(gpt, original, function, name="logits"):
    """gpt's logits obey the 2x rule: as near to float64 as the original in float32 is."""
    with torch.no_grad():
        plain = function(original)
        actual = gpt.eval()(IDX)[0]
        reference = function(original.double())
    original.float()
    result = compare(name, actual, plain, reference)
    assert result.passed, str(result)


def logits_of(model):
    return model.eval()(IDX)[0]


# ------------------------------------------------------------------------------------- notebook


@pytest.fixture
def notebook(tmp_path):
    """A NaiveGPT, which has the notebook's names, and the file of its state dict."""
    model = randomise(NaiveGPT(TINY))
    torch.save(model.state_dict(), tmp_path / "model_5000.pth")
    return model, tmp_path / "model_5000.pth"


def test_load_notebook(notebook):
    model, path = notebook
    random_state = torch.get_rng_state()
    gpt = load_notebook(path, dropout=0.0, backend="eager")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert gpt.config == TINY
    assert_same(gpt, model, logits_of)
    assert load_notebook(path).config == TINY.replace(dropout=0.2, backend="auto")


def test_notebook_names_are_those_of_the_notebook(notebook):
    """Written out by hand, from the notebook's classes."""
    names = ["token_embedding_table.weight", "position_embedding_table.weight"]
    for block in ("blocks.0", "blocks.1"):
        for head in ("0", "1"):
            parts = ("tril", "key.weight", "query.weight", "value.weight")
            names += [f"{block}.sa.heads.{head}.{part}" for part in parts]
        for part in ("sa.proj", "ffwd.net.0", "ffwd.net.2", "ln1", "ln2"):
            names += [f"{block}.{part}.weight", f"{block}.{part}.bias"]
    names += ["ln_f.weight", "ln_f.bias", "lm_head.weight", "lm_head.bias"]
    assert sorted(torch.load(notebook[1], weights_only=True)) == sorted(names)


def test_notebook_variants_are_inferred(tmp_path):
    """A head size that does not divide, biases, no masks, the prefix of torch.compile."""
    undivided = TINY.replace(n_head=3, n_embd=17, qkv_bias=True, bias=False, head_bias=False)
    for config in (undivided, TINY.replace(head_size=3)):
        model = randomise(NaiveGPT(config))
        state = {
            "_orig_mod." + name: tensor
            for name, tensor in model.state_dict().items()
            if not name.endswith("tril")
        }
        torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        gpt = load_notebook(tmp_path / "m.pth", dropout=0.0, backend="eager")
        assert gpt.config == config
        assert_same(gpt, model, logits_of)


NOTEBOOK_EXPRESSES = {
    "notebook": {},
    "scale": {"attention_scale": "head_size"},
    "no-biases": {"bias": False, "head_bias": False},
    "tied": {"tied_head": True},
    "narrow-heads": {"head_size": 3},
}


@pytest.mark.parametrize("changes", NOTEBOOK_EXPRESSES.values(), ids=NOTEBOOK_EXPRESSES)
def test_save_notebook(tmp_path, changes):
    gpt = randomise(GPT(TINY.replace(**changes)))
    save_notebook(gpt, tmp_path / "m.pth")
    model = NaiveGPT(TINY)
    model.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True))  # strict
    with torch.no_grad():
        actual, expected = logits_of(model.double()), logits_of(gpt.double())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if not changes:
        again = load_notebook(tmp_path / "m.pth").state_dict()
        assert all(torch.equal(again[name], p.float()) for name, p in gpt.state_dict().items())


def test_save_notebook_refuses(tmp_path):
    for changes, message in (
        ({"activation": "gelu"}, "activation relu; got gelu"),
        ({"head_size": 9}, "head_size 8; got 9"),
        ({"qkv_bias": True}, r"has no blocks\.\d\.qkv\.bias; got one that is not zero"),
        ({"position": "rotary"}, "learned positions; got position rotary"),
        ({"token_shift": True}, "no token_shift; got token_shift True"),
    ):
        with pytest.raises(ConfigError, match="the notebook's model has .*" + message[-9:]):
            save_notebook(randomise(GPT(TINY.replace(**changes))), tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()


def damaged(state, kind):
    """A state dict with one thing wrong, and what must be said of it."""
    if kind == "missing":
        del state["blocks.1.ffwd.net.0.bias"]
        return "lacks blocks.1.ffwd.net.0.bias"
    if kind == "unknown":
        state["blocks.1.extra"] = torch.zeros(1)
        return "has unknown blocks.1.extra"
    if kind == "shape":
        state["ln_f.bias"] = torch.zeros(C + 1)
        return r"ln_f.bias \(17,\), must be \(16,\)"
    if kind == "head":
        state["blocks.0.sa.heads.1.key.weight"] = torch.zeros(4, C)
        return r"blocks.0.sa.heads.1.key.weight \(4, 16\), must be \(8, 16\)"
    if kind == "bigram":
        for name in [name for name in state if name != "token_embedding_table.weight"]:
            del state[name]
        return "lacks position_embedding_table.weight"
    state["ln_f.bias"] = [0.0]
    return "not a state dict"


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "head", "bigram", "list"])
def test_damaged_notebooks_are_refused(notebook, kind):
    model, path = notebook
    state = dict(model.state_dict())
    message = damaged(state, kind)
    torch.save(state, path)
    with pytest.raises(ConfigError, match=message) as error:
        load_notebook(path)
    assert "\n" not in str(error.value)


def test_an_untied_notebook_is_not_tied(notebook, tmp_path):
    """One matrix would take the place of the other."""
    with pytest.raises(ConfigError, match="tied_head must be False: lm_head.weight is not token_"):
        load_notebook(notebook[1], tied_head=True)
    model = randomise(NaiveGPT(TINY.replace(tied_head=True)))
    torch.save(model.state_dict(), tmp_path / "tied.pth")
    gpt = load_notebook(tmp_path / "tied.pth", tied_head=True, dropout=0.0, backend="eager")
    assert gpt.lm_head.weight is gpt.token_embedding.weight
    assert_same(gpt, model, logits_of)


def test_files_that_are_no_state_dicts_are_refused(notebook, tmp_path):
    model, path = notebook
    torch.save(model, path)
    with pytest.raises(ConfigError, match="pickled model.*torch.save"):
        load_notebook(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(ConfigError, match="no PyTorch file"):
        load_notebook(path)
    path.write_text("hello")
    with pytest.raises(ConfigError, match="no PyTorch file"):
        load_notebook(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="no PyTorch file"):
        load_notebook(path)
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ConfigError, match="no PyTorch file"):
        load_notebook(path)
    with pytest.raises(ConfigError, match="cannot read .*No such file"):
        load_notebook(tmp_path / "absent.pth")
    with pytest.raises(ConfigError, match="cannot read"):
        load_notebook(tmp_path)


def test_overrides(notebook):
    _, path = notebook
    with pytest.raises(ConfigError, match="no field bakend"):
        load_notebook(path, bakend="eager")
    with pytest.raises(ConfigError, match="another shape: .*token_embedding_table.weight"):
        load_notebook(path, vocab_size=12)
    assert load_notebook(path, attention_scale="head_size").config.scale == (C / H) ** -0.5


# -------------------------------------------------------------------------------------- nanoGPT


def nanogpt_state(bias, seed=3):
    """nanoGPT's names and shapes, written out by hand."""
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (S, C)}
    for i in range(L):
        block = f"transformer.h.{i}."
        for part, shape in (
            ("ln_1", (C,)),
            ("attn.c_attn", (3 * C, C)),
            ("attn.c_proj", (C, C)),
            ("ln_2", (C,)),
            ("mlp.c_fc", (4 * C, C)),
            ("mlp.c_proj", (C, 4 * C)),
        ):
            shapes[f"{block}{part}.weight"] = shape
            if bias:
                shapes[f"{block}{part}.bias"] = shape[:1]
    shapes["transformer.ln_f.weight"] = (C,)
    if bias:
        shapes["transformer.ln_f.bias"] = (C,)
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(s, generator=generator) * 0.3 for name, s in shapes.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def nanogpt_logits(state):
    """nanoGPT's forward, from its equations."""
    w = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def norm(x, name):
        return F.layer_norm(x, (C,), w[name + ".weight"], w.get(name + ".bias"), 1e-5)

    x = w["wte.weight"][IDX] + w["wpe.weight"]
    past = torch.ones(S, S).tril().bool()
    for i in range(L):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, dim=2)
        q, k, v = (t.view(3, S, H, C // H).transpose(1, 2) for t in (q, k, v))
        p = (q @ k.mT / math.sqrt(C // H)).masked_fill(~past, -math.inf).softmax(-1)
        x = x + linear((p @ v).transpose(1, 2).reshape(3, S, C), f"h.{i}.attn.c_proj")
        x = x + linear(
            F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj"
        )
    return linear(norm(x, "ln_f"), "lm_head")


def nanogpt_file(path, state, **changes):
    arguments = dict(n_layer=L, n_head=H, n_embd=C, block_size=S, vocab_size=V, dropout=0.1)
    arguments |= {"bias": any(name.endswith("ln_f.bias") for name in state)}
    checkpoint = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": arguments,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True},
    }
    torch.save(checkpoint | changes, path)
    return path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_load_nanogpt(tmp_path, bias, compiled):
    state = nanogpt_state(bias)
    saved = {("_orig_mod." if compiled else "") + name: tensor for name, tensor in state.items()}
    mask = torch.ones(1, 1, S, S).tril()
    saved |= {f"transformer.h.{i}.attn.bias": mask for i in range(L)}  # without SDPA
    gpt = load_nanogpt(nanogpt_file(tmp_path / "ckpt.pt", saved), backend="eager")
    assert gpt.config.tied_head and gpt.lm_head.weight is gpt.token_embedding.weight
    assert gpt.config.dropout == 0.1 and gpt.config.embedding_dropout
    with torch.no_grad():
        actual, plain = gpt.eval()(IDX)[0], nanogpt_logits(state)
        exact = nanogpt_logits({name: tensor.double() for name, tensor in state.items()})
    assert compare("logits", actual, plain, exact).passed
    gpt.config = gpt.config.replace(activation="gelu")  # the tanh GELU is seen to be another
    assert not compare("logits", gpt(IDX)[0].detach(), plain, exact).passed


def test_nanogpt_refusals(tmp_path):
    path, state = tmp_path / "ckpt.pt", nanogpt_state(True)
    for changes, message in (
        ({"model_args": {"n_layer": L}}, "lacks block_size, vocab_size, n_head, n_embd"),
        ({"model_args": 5}, "not a checkpoint of nanoGPT"),
        ({"model": {}}, "lacks wte.weight"),
        ({"model": state | {"transformer.h.0.x": torch.zeros(1)}}, "unknown h.0.x"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_nanogpt(nanogpt_file(path, state, **changes))
    arguments = dict(n_layer=L, n_head=H, n_embd=C, block_size=S, vocab_size=V, bias=True)
    for change, message in (
        ({"n_layer": 10**9}, "n_layer must be 2, as the tensors have it; got 1000000000"),
        ({"n_embd": 10**9}, "n_embd must be 16"),
        ({"vocab_size": 10**12}, "vocab_size must be 11"),
        ({"bias": False}, "has unknown h.0.attn.c_attn.bias.*and 10 more"),
        ({"n_head": 0}, "n_head must be at least 1; got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_nanogpt(nanogpt_file(path, state, model_args=arguments | change))
    torch.save(state, path)
    with pytest.raises(ConfigError, match="not a checkpoint of nanoGPT"):
        load_nanogpt(path)


# --------------------------------------------------------------------------------- transformers


def hugging_face(transformers, **changes):
    """A GPT2LMHeadModel with random weights and biases."""
    options = dict(vocab_size=V, n_positions=S, n_embd=C, n_layer=L, n_head=H)
    options |= {"bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**options | changes)
    return randomise(transformers.GPT2LMHeadModel(config)).eval()


def hugging_face_logits(model):
    return model.eval()(IDX).logits


GPT2_VARIANTS = {
    "gpt2": {},
    "untied": {"tie_word_embeddings": False},
    "erf": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "no-scale": {"scale_attn_weights": False},
    "layer-scale": {"scale_attn_by_inverse_layer_idx": True},
    "dropout": {"resid_pdrop": 0.3, "embd_pdrop": 0.0},
}


@pytest.mark.parametrize("changes", GPT2_VARIANTS.values(), ids=GPT2_VARIANTS)
def test_load_transformers(transformers, tmp_path, changes):
    model = hugging_face(transformers, **changes)
    model.save_pretrained(tmp_path)
    gpt, theirs = load_transformers(tmp_path, backend="eager"), model.config
    assert_same(gpt, model, hugging_face_logits)
    dropped = gpt.config.dropout, gpt.config.embedding_dropout
    assert dropped == (theirs.resid_pdrop, theirs.embd_pdrop > 0)


def test_load_transformers_without_a_head_or_from_a_pickle(transformers, tmp_path):
    model = hugging_face(transformers)
    model.transformer.save_pretrained(tmp_path)  # GPT2Model: no prefix, no head
    gpt = load_transformers(tmp_path)
    assert_same(gpt, model, hugging_face_logits)
    (tmp_path / "model.safetensors").unlink()
    mask = torch.ones(1, 1, S, S).tril().bool()
    old = {f"transformer.h.{i}.attn.bias": mask for i in range(L)}
    old |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(L)}
    torch.save(model.state_dict() | old, tmp_path / "pytorch_model.bin")
    again = load_transformers(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in gpt.state_dict().items())


GPT_VARIANTS = {
    "gpt2": dict(
        qkv_bias=True,
        head_bias=False,
        tied_head=True,
        activation="gelu",
        attention_scale="head_size",
        embedding_dropout=True,
        dropout=0.1,
    ),
    "notebook": {"n_embd": 18, "n_head": 3},  # scale, relu, output bias: all folded
    "nanogpt": dict(bias=False, head_bias=False, tied_head=True, activation="gelu_erf"),
    "relu2": {"activation": "relu2", "head_bias": False},
    "narrow-heads": {"head_size": 3, "qkv_bias": True},
}


@pytest.mark.parametrize("changes", GPT_VARIANTS.values(), ids=GPT_VARIANTS)
def test_save_transformers(transformers, tmp_path, changes):
    """Both ways: transformers computes the same, and what it saved comes back."""
    gpt = randomise(GPT(TINY.replace(**changes))).eval()
    save_transformers(gpt, tmp_path / "hf")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        expected = gpt.double()(IDX)[0]
        for actual in (hugging_face_logits(model.double()), load_transformers(tmp_path / "hf")):
            if isinstance(actual, GPT):
                actual = actual.double().eval()(IDX)[0]
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    if changes == GPT_VARIANTS["gpt2"]:
        again = load_transformers(tmp_path / "hf", backend="eager", init="notebook")
        assert again.config == gpt.config
        state = gpt.float().state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_save_transformers_refuses(tmp_path):
    for changes, message in (
        ({"n_head": 3}, "n_embd divisible by n_head; got 16, 3"),
        ({"head_size": 9}, "head_size 8; got 9"),
        ({"vocab_size": 17}, "no output bias.*vocab_size 17, n_embd 16"),
        ({"position": "rotary"}, "learned positions; got position rotary"),
        ({"token_shift": True}, "no token_shift; got token_shift True"),
    ):
        with pytest.raises(ConfigError, match=message):
            save_transformers(randomise(GPT(TINY.replace(**changes))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folding_sees_damage(tmp_path, monkeypatch):
    """Without the fold of the scale the exported model is seen to be another."""
    gpt = randomise(GPT(TINY)).eval()
    monkeypatch.setattr(GPTConfig, "scale", property(lambda self: 1.0))
    save_transformers(gpt, tmp_path)
    monkeypatch.undo()
    difference = load_transformers(tmp_path).eval()(IDX)[0] - gpt(IDX)[0]
    assert difference.abs().max() > 1e-3


def test_transformers_refusals(tmp_path):
    save_transformers(randomise(GPT(TINY)), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"model_type": "llama"}, "model_type must be gpt2; got 'llama'"),
        ({"activation_function": "silu"}, "activation_function must be one of .*got 'silu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon must be 1e-05; got 1e-06"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"n_inner": 7}, "n_inner must be 4 n_embd; got 7"),
        ({"n_layer": 3}, "n_layer must be 2"),
        ({"n_embd": "16"}, "n_embd must be a whole number"),
        ({"resid_pdrop": "x"}, "dropout must be a number; got 'x'"),
        ({"tie_word_embeddings": True}, "has unknown lm_head|^$"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | changes))
        if "tie_word_embeddings" in changes:
            assert load_transformers(tmp_path).config.tied_head  # a stray head is ignored
            continue
        with pytest.raises(ConfigError, match=message):
            load_transformers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    save_file(tensors | {name: tensors[name].t().contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"h.0.mlp.c_fc.weight \(64, 16\), must be \(16, 64\)"):
        load_transformers(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="model.safetensors: damaged"):
        load_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="needs model.safetensors.* in one file"):
        load_transformers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_transformers(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_transformers(tmp_path / "absent")


# ----------------------------------------------------------------------------------- run folders


def test_import_and_export_through_a_run(notebook, tmp_path):
    model, path = notebook
    tokenizer = CharTokenizer("abcdefghijk")
    import_model(path, "notebook", tmp_path / "run", tokenizer, dropout=0.0)
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.tokenizer.characters == "abcdefghijk"
    assert checkpoint.model == TINY.replace(backend="auto")
    export_model(tmp_path / "run", "notebook", tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigError, match="already there"):
        import_model(path, "notebook", tmp_path / "run", tokenizer)
    for multiple, characters in ((1, "abcdefghijkl"), (1, "abcdefghij"), (4, "abcdefghijk")):
        other = CharTokenizer(characters)
        message = f"knows 11 tokens, the tokenizer {len(characters)};"
        with pytest.raises(ConfigError, match=message):
            import_model(path, "notebook", tmp_path / "other", other, vocab_multiple=multiple)
    with pytest.raises(ConfigError, match="vocab_multiple must be at least 1; got 0"):
        import_model(path, "notebook", tmp_path / "other", tokenizer, vocab_multiple=0)
    with torch.no_grad():
        model.lm_head.bias[3] = math.nan
    torch.save(model.state_dict(), path)
    with pytest.raises(ConfigError, match="finite; got nan or inf in lm_head.bias"):
        import_model(path, "notebook", tmp_path / "other", tokenizer)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="cannot export 'nanogpt'; formats: notebook, transf"):
        export_model(tmp_path / "run", "nanogpt", tmp_path / "x")
    with pytest.raises(ConfigError, match="cannot write .*exists"):
        export_model(tmp_path / "run", "notebook", path / "x")
    with pytest.raises(ConfigError, match="already there"):
        export_model(tmp_path / "run", "transformers", path)


@pytest.mark.parametrize("format", ["notebook", "transformers"])
def test_an_export_replaces_nothing_and_is_whole_or_not_there(notebook, tmp_path, capsys, format):
    """What is there stays, a full disk leaves nothing, and others may read what the umask says."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    run, out = tmp_path / "run", tmp_path / "new" / "out"
    import_model(notebook[1], "notebook", run, CharTokenizer("abcdefghijk"))
    argv = ["export", str(run), str(out), f"--format={format}"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == f"error: cannot write {out}: File too large\n"
    assert list(out.parent.iterdir()) == []
    before = os.umask(0o027)
    try:
        assert main(argv) == 0
    finally:
        os.umask(before)
    assert list(out.parent.iterdir()) == [out]
    files = [out] if out.is_file() else list(out.iterdir())
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
    content = [file.read_bytes() for file in files]
    capsys.readouterr()
    assert main(argv) == 2
    assert capsys.readouterr().err == f"error: {out}: already there; give a new name\n"
    assert [file.read_bytes() for file in files] == content


def test_a_notebooks_model_is_imported_with_its_text(tmp_path, capsys):
    """Without one the tokenizer was taken for GPT-2's, whose package was missed."""
    torch.save(NaiveGPT(TINY).state_dict(), tmp_path / "m.pth")
    argv = ["import", str(tmp_path / "m.pth"), str(tmp_path / "run"), "--format=notebook"]
    assert main(argv) == 2
    assert "--format notebook needs --data, the text" in capsys.readouterr().err


def test_a_padded_vocabulary_is_imported_by_its_multiple(tmp_path, capsys, monkeypatch):
    """Ten characters in eleven tokens, as --vocab_multiple 11 pads them."""
    torch.save(randomise(NaiveGPT(TINY)).state_dict(), tmp_path / "m.pth")
    (tmp_path / "text.txt").write_text("hello, abcd")
    argv = ["import", str(tmp_path / "m.pth"), str(tmp_path / "run"), "--format=notebook"]
    argv += [f"--data={tmp_path / 'text.txt'}"]
    assert main(argv) == 2
    assert "knows 11 tokens, the tokenizer 10;" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    argv[-1] = "--data=text.txt"
    assert main([*argv, "--vocab_multiple=11"]) == 0
    monkeypatch.chdir("/")  # where eval finds the text all the same
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "text.txt: loss " in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "run").train.vocab_multiple == 11
    with pytest.raises(ConfigError, match="was imported, .* start from it: --init_from"):
        prepare(parse_settings([f"--out_dir={tmp_path / 'run'}", "--resume", "--device=cpu"]))
    assert main(["sample", str(tmp_path / "run"), "--start=h", "--max_new_tokens=50"]) == 0


@pytest.mark.parametrize("format", ["nanogpt", "transformers"])
def test_other_checkpoints_become_runs(request, tmp_path, capsys, format):
    """The run's model says what the file's does, and a run is sampled like any other."""
    path, run = tmp_path / "theirs", str(tmp_path / "run")
    if format == "nanogpt":
        state = nanogpt_state(bias=False)
        nanogpt_file(path, state)
        expected = nanogpt_logits(state)
    else:
        model = hugging_face(request.getfixturevalue("transformers"))
        model.save_pretrained(path)
        expected = hugging_face_logits(model).detach()
    (tmp_path / "text.txt").write_text("hello, abcdf")  # eleven characters
    data = f"--data={tmp_path / 'text.txt'}"
    assert main(["import", str(path), run, f"--format={format}", data]) == 0
    checkpoint = open_checkpoint(run)
    gpt = GPT(checkpoint.model).eval()
    checkpoint.load_weights(gpt)
    torch.testing.assert_close(gpt(IDX)[0].detach(), expected, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert main(["sample", run, "--start=hello", "--max_new_tokens=20"]) == 0
    assert len(capsys.readouterr().out) == len("hello") + 20 + len("\n")
    assert main(["eval", run]) == 0
    assert "text.txt: loss " in capsys.readouterr().out


def test_command_lines(notebook, tmp_path, capsys):
    """A run becomes a file and the file a run, which samples the same text."""
    _, path = notebook
    (tmp_path / "text.txt").write_text("hello, abcdf")  # eleven characters
    run, data = str(tmp_path / "run"), f"--data={tmp_path / 'text.txt'}"
    assert main(["import", str(path), run, "--format=notebook", data]) == 0
    assert f"python -m gptcore sample {run}" in capsys.readouterr().out
    out = str(tmp_path / "out.pth")
    assert main(["export", run, out, "--format=notebook"]) == 0
    assert main(["import", out, run + "2", "--format=notebook", data]) == 0
    capsys.readouterr()
    texts = []
    for folder in (run, run + "2"):
        assert main(["sample", folder, "--start=hello", "--seed=1", "--max_new_tokens=20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) == 26
    for argv, message in (
        ([str(path), run + "3", "--format=notebok", data], "cannot import 'notebok'; formats: no"),
        ([str(path), run, "--format=notebook", data], "already there"),
        ([str(path), out + "/run", "--format=notebook", data], "Not a directory; give another"),
        ([str(path), run + "3", "--format=notebook", "--tokenizer=char"], "needs --data"),
        ([str(path), run + "3", "--format=notebook", "--tokenizer=bytes"], "the tokenizer 256"),
        ([str(tmp_path / "x"), run + "3", "--format=nanogpt", data], "cannot read"),
    ):
        assert main(["import", *argv]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run3").exists()
