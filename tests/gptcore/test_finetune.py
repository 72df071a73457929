"""Fine-tuning: what is taken over, by name, what is new, what is frozen."""

import pytest
import torch
from safetensors.torch import load_file

from gptcore.checkpoint import open_checkpoint
from gptcore.config import ConfigError
from gptcore.finetune import freeze
from gptcore.flags import parse_settings
from gptcore.log import read_metrics
from gptcore.model import GPT
from gptcore.trainer import prepare, train
from kernels.rng import make_key

NEW = "#%\u00e9"


@pytest.fixture(scope="module")
def other_text(text_file, tmp_path_factory) -> str:
    """The shared text without "k" and "q", with three characters it does not have."""
    text = open_text(text_file).replace("k", NEW[0]).replace("q", NEW[1])
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text(text.replace("good", f"go{NEW[2]}d"), encoding="utf-8")
    return str(path)


def open_text(path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


@pytest.fixture
def start(tiny_flags, tmp_path):
    """start(*flags) -> a Run of the tiny settings, prepared, not trained."""
    count = iter(range(100))

    def prepared(*flags, base=tiny_flags):
        flags = [*base, f"--out_dir={tmp_path / f'run{next(count)}'}", *flags]
        run = prepare(parse_settings(flags))
        run.flags = flags
        return run

    return prepared


def learn(run, *more) -> dict[str, torch.Tensor]:
    """Train with the flags of `run`; the last weights."""
    run.unlock()
    train(parse_settings([*run.flags, "--resume", *more]))
    return load_file(run.folder / "last" / "model.safetensors")


@pytest.fixture
def tuned(start, trained_run, other_text):
    """tuned(*flags) -> a Run on the other text that starts from the trained one."""
    return lambda *flags: start(f"--init_from={trained_run}", f"--data={other_text}", *flags)


def characters(run) -> list[str]:
    tokenizer = run.corpus.tokenizer
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]


# ---- what is taken over ----------------------------------------------------------------------


def test_the_same_text_takes_everything(start, trained_run, capsys):
    run = start(f"--init_from={trained_run}")
    found = load_file(trained_run / "best" / "model.safetensors")
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight, found[name]), name
    size = run.corpus.tokenizer.vocab_size
    assert f"from    {trained_run}/best: {size} of {size} tokens known\n" in capsys.readouterr().out
    assert run.step == 0 and run.config.init_from == str(trained_run)


def test_tokens_are_matched_by_character(tuned, start, trained_run, other_text, capsys):
    """Known rows are the trained ones, new ones those of a fresh run; all else is the trained."""
    run = tuned()
    out = capsys.readouterr().out
    fresh = start(f"--data={other_text}")
    origin = open_checkpoint(trained_run)
    found = origin.read_weights()
    known = origin.tokenizer.characters
    for name in ("token_embedding.weight", "lm_head.weight", "lm_head.bias"):
        weight, untrained = (dict(r.model.named_parameters())[name] for r in (run, fresh))
        for row, character in enumerate(characters(run)):
            if character in NEW:
                assert torch.equal(weight[row], untrained[row]), (name, character)
            else:
                assert torch.equal(weight[row], found[name][known.index(character)])
    for name, weight in run.model.named_parameters():
        if name.split(".")[0] not in ("token_embedding", "lm_head"):
            assert torch.equal(weight, found[name]), name
    assert f"3 new, to be learned: {NEW!r}; 2 dropped: 'kq'" in out


@pytest.mark.parametrize(
    "flags",
    [
        "--model=naive",
        "--model=gpt --tied_head",
        "--model=bigram",
        "--model=head --tokenizer=bytes",
    ],
)
def test_logits_of_known_text_are_the_old_ones(start, tmp_path, text_file, other_text, flags):
    """Every model, kind of tokenizer and head: known characters among themselves are as before."""
    old = start(*flags.split(), "--max_iters=2")
    learn(old)
    more = [] if "bigram" in flags else ["--dropout=0"]
    new = start(f"--init_from={old.folder}", f"--data={other_text}", *more)
    checkpoint = open_checkpoint(old.folder)
    checkpoint.load_weights(old.model)
    text = "the queen that we were".replace("q", "w")[:8]
    logits = []
    for run in (old, new):
        idx = torch.tensor(run.corpus.tokenizer.encode(text).astype("int64"))[None]
        row = run.model.eval()(idx)[0][0]
        logits.append({c: row[:, i] for i, c in enumerate(characters(run))})
    shared = logits[0].keys() & logits[1].keys()
    assert len(shared) > 10
    for character in shared:
        torch.testing.assert_close(logits[1][character], logits[0][character])


def test_a_new_kind_of_tokenizer_is_matched_by_bytes(start, trained_run):
    run = start(f"--init_from={trained_run}", "--tokenizer=bytes")
    origin = open_checkpoint(trained_run)
    found = origin.read_weights()["token_embedding.weight"]
    for row, character in enumerate(origin.tokenizer.characters):
        assert torch.equal(run.model.token_embedding.weight[ord(character)], found[row])


@pytest.mark.parametrize("block_size", [5, 12])
def test_positions_are_cut_or_added(start, trained_run, block_size, capsys):
    run = start(f"--init_from={trained_run}", f"--block_size={block_size}")
    fresh = start(f"--block_size={block_size}").model.position_embedding.weight
    found = open_checkpoint(trained_run).read_weights()["position_embedding.weight"]
    weight, kept = run.model.position_embedding.weight, min(block_size, 8)
    assert torch.equal(weight[:kept], found[:kept])
    assert torch.equal(weight[kept:], fresh[kept:])
    assert f"positions 8 -> {block_size}" in capsys.readouterr().out


def test_the_learning_rate_is_a_third_unless_given(tuned, capsys):
    assert tuned().config.learning_rate == pytest.approx(5e-3 / 3)
    assert "learning rate 0.00167, the preset's divided by 3" in capsys.readouterr().out
    run = tuned("--learning_rate=1e-3", "--min_lr=1e-4", "--schedule=cosine")
    assert (run.config.learning_rate, run.config.min_lr) == (1e-3, 1e-4)
    assert "divided" not in capsys.readouterr().out


def test_the_learning_rate_is_never_above_the_origins(start, text_file, trained_run, capsys):
    """Preset cpu has a higher one than baby-cpu, with which the origin was trained."""
    flags = ["--preset=cpu", f"--data={text_file}", "--device=cpu", "--min_lr=6e-4"]
    run = start(f"--init_from={trained_run}", base=flags)
    assert run.config.learning_rate == pytest.approx(5e-3 / 3) and run.config.min_lr == 6e-4
    assert f"0.00167, that of {trained_run}" in capsys.readouterr().out
    run = start(f"--init_from={trained_run}", base=["--preset=nanogpt-cpu", *flags[1:3]])
    assert run.config.learning_rate == pytest.approx(1e-3 / 3)
    assert run.config.min_lr == pytest.approx(1e-4 / 3)


def test_the_model_is_the_origins(start, text_file, trained_run):
    """Also where the preset says otherwise; dropout is free."""
    flags = ["--preset=nanogpt-cpu", f"--data={text_file}", "--device=cpu", "--dropout=0.3"]
    run = start(f"--init_from={trained_run}", base=flags)
    assert run.model.config == open_checkpoint(trained_run).model.replace(dropout=0.3)


def test_it_learns_faster_than_from_scratch(tuned, start, other_text, tmp_path):
    runs = (
        tuned("--max_iters=6", "--learning_rate=5e-3"),
        start(f"--data={other_text}", "--max_iters=6"),
    )
    losses = []
    for run in runs:
        learn(run)
        losses.append(read_metrics(run.folder / "metrics.jsonl")[-1]["val_loss"])
    assert losses[0] < losses[1] - 0.1


def test_resuming_goes_on_from_itself(tuned, tmp_path):
    """12 steps, and 8 then 4 with the flags of the start: the origin is not loaded again."""
    whole, parts = learn(tuned()), tuned()
    learn(parts, "--max_iters=8")
    resumed = learn(parts)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_embd=32"], "--init_from: n_embd is 16 in .* cannot become 32; leave --n_embd out"),
        (["--model=naive"], "--init_from: model is 'gpt' in .* cannot become 'naive'"),
        (["--init_from=/no/such/run"], "/no/such/run: no such run folder"),
        (["--freeze=embedding"], "freeze must be of embeddings, head and blocks:N some"),
        (["--freeze=blocks:3"], "N from 1 to 2; got 'blocks:3'"),
        (["--freeze=blocks"], "got 'blocks'"),
        (["--log=tensorbord"], "did you mean tensorboard"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_fine_tuning(tiny_flags, trained_run, tmp_path, flags, message):
    flags = [*tiny_flags, f"--init_from={trained_run}", *flags]
    with pytest.raises(ConfigError, match=message):
        prepare(parse_settings([*flags, f"--out_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_settings_that_the_origin_ignores(start):
    origin = start("--model=head")
    learn(origin, "--max_iters=1")
    with pytest.raises(ConfigError, match="--embedding_dropout says nothing to --model head"):
        start(f"--init_from={origin.folder}", "--embedding_dropout")
    with pytest.raises(ConfigError, match="--embedding_dropout says nothing to --model head"):
        learn(origin, "--embedding_dropout")


def test_a_text_with_nothing_in_common(start, trained_run, tmp_path):
    path = tmp_path / "digits.txt"
    path.write_text("0123456789" * 100)
    with pytest.raises(ConfigError, match="share no token; give --tokenizer"):
        start(f"--init_from={trained_run}", f"--data={path}")


# ---- what is frozen --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "frozen"),
    [
        ("embeddings", ["token_embedding.", "position_embedding."]),
        ("blocks:1", ["blocks.0."]),
        ("embeddings,blocks:2", ["token_embedding.", "position_embedding.", "blocks."]),
        ("head", ["lm_head."]),
    ],
)
def test_frozen_weights_stay_and_others_learn(tuned, spec, frozen):
    run = tuned(f"--freeze={spec}", "--max_iters=3", "--decay_params=all")
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    after = learn(run)
    for name, weight in before.items():
        assert torch.equal(after[name], weight) == name.startswith(tuple(frozen)), name


@pytest.mark.parametrize("spec", ["embeddings", "embeddings,blocks:1", "blocks:2", "head"])
def test_gradients_do_not_depend_on_what_is_frozen(start, spec):
    model = start("--dropout=0.2").model
    idx = torch.arange(32).view(4, 8) % model.config.vocab_size
    gradients = []
    for what in ("", spec):
        freeze(model, what)
        model.zero_grad(set_to_none=True)
        model(idx, idx, make_key(1, 2), return_logits=False)[1].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    thawed = {name for name, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(thawed) < len(gradients[0])
    for name, gradient in gradients[0].items():
        if name in thawed:
            torch.testing.assert_close(gradients[1][name], gradient)
        else:
            assert gradients[1][name] is None


def test_freezing_everything_is_refused(start):
    model = start("--model=bigram").model
    with pytest.raises(ConfigError, match="freeze leaves nothing to train; got 'embeddings'"):
        freeze(model, "embeddings")


@pytest.mark.parametrize(
    ("flags", "spec", "message"),
    [
        (["--tied_head"], "head", "no head of its own to freeze; its head is the token embedding"),
        (["--model=bigram"], "blocks:1", "this model has no blocks:1 of its own"),
    ],
)
def test_what_a_model_does_not_have_is_not_frozen(start, flags, spec, message):
    with pytest.raises(ConfigError, match=message):
        freeze(start(*flags).model, spec)


def test_a_tied_head_that_the_model_has_not_is_not_in_the_way(start):
    """The preset ties it; the rungs of the ladder have their own all the same."""
    run = start("--preset=nanogpt-char", "--model=multihead", "--freeze=head", "--block_size=8")
    assert not run.model.lm_head.weight.requires_grad
    assert run.model.token_embedding_table.weight.requires_grad


def test_what_is_frozen_is_fixed_on_resume(tuned):
    run = tuned("--freeze=head", "--max_iters=2")
    learn(run)
    with pytest.raises(ConfigError, match="freeze is 'head' in .* cannot become 'embeddings'"):
        learn(run, "--freeze=embeddings")


def test_where_a_run_started_is_fixed_on_resume(start, trained_run):
    run = start("--max_iters=2")
    learn(run)
    with pytest.raises(ConfigError, match="init_from is None in .* cannot become"):
        learn(run, f"--init_from={trained_run}")


def test_freeze_needs_no_origin(start):
    run = start("--freeze=blocks:1")
    assert isinstance(run.model, GPT)
    assert {n for n, p in run.model.named_parameters() if not p.requires_grad} == {
        n for n, _ in run.model.named_parameters() if n.startswith("blocks.0.")
    }
