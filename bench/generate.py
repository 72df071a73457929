"""How many tokens a second does generation write?

Question
    What does the key-value cache buy, at batch 1 and 16, beside the notebook's loop, nanoGPT and
    transformers?
Method
    Greedy continuation of a prompt within one block, random weights of the preset nanogpt-char
    (10.8M parameters). Peers own copies of the same weights, wired as nanoGPT is.
    Check: every token chosen must be, given the contestant's own prefix, the likeliest in
    float64 or fall short of it by no more than four times the error of plain PyTorch's logits.
Formula
    tokens/s: new tokens of all sequences. bytes: all weights once a new position.
"""

import functools
from collections.abc import Iterator

import torch
from torch import nn

from bench import models
from bench.harness import OURS, Case, Check, Contestant, Options, Work
from gptcore.config import GPTConfig
from gptcore.flags import split_fields
from gptcore.presets import PRESETS

PROMPT = 16
WHOLE_BLOCK = 240  # new tokens that fill the block with the prompt


@torch.no_grad()
def notebook_loop(model, idx, new: int):
    """The notebook's generate, greedy: the whole window again for every token."""
    for _ in range(new):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def check_tokens(tokens: torch.Tensor, source: models.GPT, dtype: torch.dtype) -> Check:
    """Whether each new token is the likeliest, up to the rounding of its dtype."""
    window = tokens[:, :-1]
    plain, exact = models.reference_logits(source, window, dtype)
    allowed = 4 * (plain.double() - exact).abs().max().item()
    exact, chosen = exact[:, PROMPT - 1 :], tokens[:, PROMPT:, None]
    shortfall = (exact.amax(-1, keepdim=True) - exact.gather(-1, chosen)).max().item()
    passed = shortfall <= allowed
    text = "greedy" if passed else f"{shortfall:.2g} short"
    return Check(passed, text, () if passed else (f"token {text} of the likeliest",))


def cases(options: Options) -> list[Case]:
    """A sweep over the number of new tokens, and a batch of 16."""
    cuda = options.device.type == "cuda"
    new = (60, 120, 240) if cuda else (4, 8, 16) if options.quick else (24, 48, 96)
    cases = [
        _case(1, N, options, sweeps=("N",), quick=N == new[1]) for N in (new[1], new[0], new[2])
    ]
    cases.append(_case(16, new[1], options))
    if not cuda:
        cases.append(_case(1, WHOLE_BLOCK, options, full=True))
    return cases


def _case(B: int, new: int, options: Options, **rest) -> Case:
    fields = split_fields(PRESETS["nanogpt-char"])[1]
    config = GPTConfig(**{**fields, **models.NANOGPT_WIRING, "dropout": 0.0})
    model = models.meta(config)
    weights = model.num_parameters() * options.dtype.itemsize
    multiplied = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    work = Work(2 * multiplied * B * (new + PROMPT), weights * new, B * new)
    return Case(
        name=f"B{B} N{new}",
        shape={"B": B, "N": new, "kind": "greedy"},
        dtype=str(options.dtype).removeprefix("torch."),
        work=work,
        unit="tokens/s",
        open=functools.partial(_open, B, new, config, options),
        flush=False,
        **rest,
    )


def _open(B: int, new: int, config: GPTConfig, options: Options) -> Iterator[Contestant]:
    from gptcore import GPT, generate

    torch.manual_seed(1337)
    with torch.device(options.device):
        source = GPT(config).eval()
        prompt = torch.randint(config.vocab_size, (B, PROMPT))
    # Larger weights than at initialisation, so that greedy choices are not ties.
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    source_in_dtype = GPT(config).to(options.device, options.dtype).eval()
    source_in_dtype.load_state_dict(source.state_dict())

    def contestant(name, build):
        built = functools.cache(build)
        return Contestant(
            name,
            start=built,
            check=lambda: check_tokens(built()(), source, options.dtype),
        )

    def ours(**how):
        return lambda: generate(source_in_dtype, prompt, max_new_tokens=new, temperature=0.0, **how)

    def naive():
        model = source.to_naive().to(options.dtype).eval()
        return lambda: notebook_loop(model, prompt, new)

    def nanogpt():
        model = models.to_nanogpt(source, options).to(options.dtype).eval()
        return lambda: model.generate(prompt, new, top_k=1)

    def transformers():
        with torch.device(options.device):
            wired = GPT(config.replace(**models.GPT2_WIRING)).eval()
        wired.load_state_dict(source.state_dict(), strict=False)  # biases stay zero
        model = models.to_transformers(wired, options).to(options.dtype).eval()
        settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        return lambda: model.generate(
            prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **settings
        )

    yield contestant(OURS, lambda: ours())
    peers = {
        "gptcore-no-cache": lambda: ours(cache=False),
        "naive": naive,
        "nanogpt": nanogpt,
        "transformers": transformers,
    }
    for name, build in peers.items():
        if options.wants(name) or name.startswith(OURS):
            yield contestant(name, build)
