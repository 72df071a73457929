"""Proof that the certificate can fail: damages to the ops, each of which a check must catch.

    python -m kernels.verify --self-test

A damage replaces text of a module while Python imports it, in a process of its own; no file
changes. Run as a script, with a damage as JSON, this file is that process: it imports nothing of
the package before the damage is in place. Packages built on the ops add damages to what they add
to the certificate, by `register_damages`.
"""

import importlib.abc
import importlib.machinery
import json
import linecache
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOLD_DAMAGES = ("damages.py", "verification.py")  # files that quote what they damage


@dataclass(frozen=True)
class Damage:
    """`old`, which occurs `count` times in the sources of `package`, becomes `new`."""

    op: str
    backend: str
    what: str
    old: str
    new: str
    count: int = 1
    package: str = "kernels"


DAMAGES = (
    Damage(
        "causal_attention",
        "triton",
        "the causal mask shifted by one",
        's = tl.where((start_n + offs_n)[None, :] <= offs_m[:, None], s, float("-inf"))',
        's = tl.where((start_n + offs_n)[None, :] <= offs_m[:, None] + 1, s, float("-inf"))',
    ),
    Damage(
        "causal_attention",
        "triton",
        "the scale of the logits dropped",
        "scale = D**-0.5 if scale is None else scale",
        "scale = 1.0 if scale is None else scale",
    ),
    Damage(
        "causal_attention",
        "triton",
        "delta forgotten in dq",
        "ds = p * (dp - delta[:, None])",
        "ds = p * dp",
    ),
    Damage(
        "causal_attention",
        "eager",
        "the causal mask shifted by one",
        "mask.triu_(1 + Tk - Tq)",
        "mask.triu_(2 + Tk - Tq)",
    ),
    Damage(
        "causal_attention_qkv",
        "triton",
        "two lanes of the dropout mask swapped",
        "shifts = (16 - 16 * tl.arange(0, 2))",
        "shifts = (16 * tl.arange(0, 2))",
    ),
    Damage(
        "causal_attention_qkv",
        "triton",
        "the mask in another order of the keys than the scores",
        "keep = keep.reshape(rows.shape[0], COLS // 32, 4, 4, 2).permute(0, 1, 3, 2, 4)",
        "keep = keep.reshape(rows.shape[0], COLS // 32, 4, 4, 2)",
    ),
    Damage(
        "causal_attention_qkv",
        "triton",
        "planes of the mask not counted in the global batch",
        "plane = first * H.to(tl.uint32) + bh.to(tl.uint32)",
        "plane = bh.to(tl.uint32)",
        count=3,
    ),
    Damage(
        "causal_attention_qkv",
        "eager",
        "the survivors of dropout not scaled",
        "_scaled_product(dropped, v, factor)",
        "_scaled_product(dropped, v, 1)",
    ),
    Damage(
        "layer_norm",
        "triton",
        "a term of the gradient forgotten",
        "dr = (g - mean_g - xhat * mean_gx) * rstd",
        "dr = (g - mean_g) * rstd",
        count=2,
    ),
    Damage(
        "layer_norm",
        "triton",
        "columns past the edge in the variance",
        "centered = tl.where(mask, x - mean[:, None], 0.0)",
        "centered = x - mean[:, None]",
    ),
    Damage(
        "layer_norm",
        "eager",
        "bias forgotten",
        "y = F.layer_norm(x, weight.shape, weight, bias, eps)",
        "y = F.layer_norm(x, weight.shape, weight, None if bias is None else bias * 0, eps)",
    ),
    Damage(
        "dropout_add_layer_norm",
        "triton",
        "the survivors of dropout not scaled",
        "x = tl.where(keep, x * scale, 0.0)\n        new_residual",
        "x = tl.where(keep, x, 0.0)\n        new_residual",
    ),
    Damage(
        "dropout_add_layer_norm",
        "triton",
        "the gradient of x's bias before the mask",
        "dx_bias += tl.where(mask, dr, 0.0)",
        "dx_bias += tl.where(mask, (g - mean_g - xhat * mean_gx) * rstd, 0.0)",
    ),
    Damage(
        "dropout_add_layer_norm",
        "triton",
        "gradient of the new residual forgotten",
        "dr += dnew.to(tl.float32)",
        "dr += 0.0 * dnew.to(tl.float32)",
        count=2,
    ),
    Damage(
        "dropout_add_layer_norm",
        "eager",
        "rows of the mask not counted in the global batch",
        "rows = rows + key[2] * shape[1:-1].numel()",
        "rows = rows + 0 * key[2]",
    ),
    Damage(
        "linear_act",
        "triton",
        "ReLU's gradient passed where the output is 0",
        "dz = tl.where(saved > 0, dy, 0.0)",
        "dz = tl.where(saved >= 0, dy, 0.0)",
    ),
    Damage(
        "linear_act",
        "triton",
        "the cubic term of GELU forgotten",
        "power = z * (2.302208198144325 + 0.1029432395800235 * (z * z))",
        "power = z * 2.302208198144325",
    ),
    Damage(
        "linear_act",
        "eager",
        "the exact GELU instead of tanh's",
        'return F.gelu(z, approximate="tanh")\n    if backend',
        "return F.gelu(z)\n    if backend",
    ),
    Damage(
        "cross_entropy",
        "triton",
        "ignored rows in the gradient",
        "scale = tl.where(counts, scale, 0.0)",
        "scale = tl.where(counts, scale, 1.0)",
        count=2,
    ),
    Damage(
        "cross_entropy",
        "triton",
        "the maximum not added back",
        "loss = tl.log(l) - (picked - m)",
        "loss = tl.log(l) - picked",
    ),
    Damage(
        "cross_entropy",
        "eager",
        "the mean over all rows, ignored ones too",
        "    try:\n        return F.cross_entropy(logits, targets, ignore_index=ignore_index, "
        "reduction=reduction)",
        "    try:\n        return F.cross_entropy(logits, targets.clamp(min=0), "
        "ignore_index=ignore_index, reduction=reduction)",
    ),
    Damage(
        "linear_cross_entropy",
        "triton",
        "bias forgotten in the logits",
        "torch.addmm(bias, x_c, weight.mT, out=logits)",
        "torch.mm(x_c, weight.mT, out=logits)",
    ),
    Damage(
        "linear_cross_entropy",
        "triton",
        "dx from the wrong rows of the logits",
        "torch.mm(dlogits, weight, out=dx[chunk])",
        "torch.mm(dlogits.roll(1, 0), weight, out=dx[chunk])",
    ),
    Damage(
        "embed",
        "triton",
        "gradients not masked",
        "        dy = tl.where(keep, dy, 0.0)",
        "        dy = tl.where(keep, dy, dy)",
    ),
    Damage(
        "embed",
        "triton",
        "two words of the dropout mask swapped",
        "return pair0, pair1",
        "return pair1, pair0",
    ),
    Damage(
        "embed",
        "eager",
        "positions from the second on",
        "x.add_(position_weight[: idx.shape[1]])",
        "x.add_(position_weight[1 : 1 + idx.shape[1]])",
    ),
    Damage(
        "rotary_qkv",
        "triton",
        "the gradient turned forward",
        "            sin = -sin\n",
        "            sin = 1 * sin\n",
    ),
    Damage(
        "rotary_qkv",
        "triton",
        "values turned too",
        "    if place < 2 * H:",
        "    if place < 3 * H:",
    ),
    Damage(
        "rotary_qkv",
        "eager",
        "a term of the normalisation's gradient forgotten",
        "g.addcmul_(y, along, value=-1).mul_(rstd)",
        "g.mul_(rstd)",
    ),
    Damage(
        "dropout_keep_mask",
        "eager",
        "a round of Philox left out",
        "for k0, k1 in keys[2:]:",
        "for k0, k1 in keys[3:]:",
    ),
    Damage(
        "dropout_keep_mask",
        "eager",
        "kept and dropped exchanged",
        "np.greater_equal(lanes",
        "np.less(lanes",
    ),
)


_registered: list[Damage] = []


def register_damages(*damages: Damage) -> None:
    """Have the self-test try `damages` too; their op is a name given to `register_check`."""
    _registered.extend(damage for damage in damages if damage not in _registered)


def all_damages() -> tuple[Damage, ...]:
    """Those to the ops, then the registered ones."""
    return (*DAMAGES, *_registered)


def occurrences(damage: Damage) -> int:
    """How often the text that `damage` replaces stands in its package."""
    files = (ROOT / damage.package).glob("*.py")
    return sum(path.read_text().count(damage.old) for path in files if _damageable(path))


def _damageable(path: Path) -> bool:
    return path.is_file() and path.name not in HOLD_DAMAGES


# --------------------------------------------------------------------- the process of one damage


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module's source with the damage in it; `inspect`, and so Triton, sees the same."""

    damage: Damage

    def get_code(self, fullname: str):
        path = self.get_filename(fullname)
        source = Path(path).read_text().replace(self.damage.old, self.damage.new)
        # Without a modification time linecache takes the lines as they are.
        linecache.cache[path] = (len(source), None, source.splitlines(True), path)
        return compile(source, path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, damage: Damage):
        self.damage = damage

    def find_spec(self, fullname, path, target=None):
        package, _, name = fullname.partition(".")
        file = ROOT / package / f"{name}.py"
        if package != self.damage.package or not _damageable(file):
            return None
        if self.damage.old not in file.read_text():
            return None
        loader = _Loader(fullname, str(file))
        loader.damage = self.damage
        return importlib.machinery.ModuleSpec(fullname, loader, origin=str(file))


def _run_damaged(damage: Damage) -> None:
    """Print, as JSON, the first check that fails with `damage` in place; {} if none does."""
    sys.path[0] = str(ROOT)
    sys.meta_path.insert(0, _Finder(damage))
    import torch

    from kernels import checks, verify

    verify.load_plugins()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = checks.Settings(device, (damage.backend,), ("float32",), full=False, seed=0)
    for part in checks.parts(damage.op, settings):
        for result in checks.part_results(part, settings):
            if not result.passed:
                broken = [c.name for c in result.comparisons if not c.passed]
                more = [f"{len(broken) - 4} more"] if len(broken) > 4 else []
                detail = ", ".join(broken[:4] + more) or result.detail
                print(json.dumps({"check": result.check, "case": result.case, "detail": detail}))
                return
    print("{}")


# --------------------------------------------------------------------------------- the self-test


def try_damage(damage: Damage) -> dict[str, str]:
    """{"check", "case", "detail"} of the check that caught `damage`; {} if none did.

    A damage that does not apply, or that breaks the op instead of making it wrong, is not caught:
    then there is only a "detail".
    """
    if (found := occurrences(damage)) != damage.count:
        return {"detail": f"text must occur {damage.count} times in the sources; got {found}"}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    import torch

    if damage.backend == "triton" and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, __file__, json.dumps(asdict(damage))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        return {"detail": (result.stderr.strip().splitlines() or ["no message"])[-1]}
    caught = json.loads(result.stdout.splitlines()[-1])
    return {"detail": f"raises {caught['detail']}"} if caught.get("check") == "runs" else caught


def self_test(ops: Sequence[str] | None = None, json_path: Path | None = None) -> int:
    """Try every damage, or those to `ops`; print what caught each. 0 if all were, else 1."""
    from kernels.command_line import table

    damages = [damage for damage in all_damages() if not ops or damage.op in ops]
    with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:
        outcomes = list(pool.map(try_damage, damages))
    rows = []
    for damage, outcome in zip(damages, outcomes, strict=True):
        caught = outcome.get("check", "NOT CAUGHT")
        where = " ".join(filter(None, (outcome.get("case"), outcome.get("detail"))))
        rows.append([damage.op, damage.backend, damage.what, caught, where])
    print(table(["op", "backend", "damage", "caught by", "where"], rows))
    slipped = sum("check" not in outcome for outcome in outcomes)
    if json_path is not None:
        content = [
            {**asdict(damage), "caught": outcome}
            for damage, outcome in zip(damages, outcomes, strict=True)
        ]
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    verdict = f"{slipped} NOT caught" if slipped else "all caught"
    print(f"\n{len(damages)} damages: {verdict}.")
    return int(bool(slipped))


if __name__ == "__main__":
    _run_damaged(Damage(**json.loads(sys.argv[1])))
