"""The Triton kernels of `kernels.cross_entropy`, their launch plans and launchers.

A row is read once into registers while it is short; else twice, for its sum and for its gradient.
dz takes the place of z where `dlogits` is `logits`: no thread reads what another may have written.
"""

from kernels.backend import jit, launch, next_power_of_2, tl


@jit
def _exp(x):
    """e^x: one multiplication and, unlike `tl.exp`, one instruction that makes subnormals 0."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def _cross_entropy_kernel(
    logits_ptr,  # (M, V), columns contiguous
    targets_ptr,  # (M,) int64
    scales_ptr,  # (M,) float32 factors of the rows of dlogits; read if SCALED
    losses_ptr,  # (M,) float32
    dlogits_ptr,  # (M, V), columns contiguous; may be logits_ptr; written if GRADIENT
    stride_zm,
    stride_tm,
    stride_dm,
    M,
    V,
    ignore_index,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,  # at most V
    MAIN: tl.constexpr,  # MAIN * LANES <= V <= (MAIN + TAIL) * LANES
    TAIL: tl.constexpr,
):
    """Losses and, in the same pass, gradients of short rows: program i owns BLOCK_M of them.

    Tiles are (MAIN or TAIL, BLOCK_M, LANES): where rows are odd a thread holds every LANES-th
    element of its row, so that reductions cross few threads. Two tiles waste less of a V that is
    no power of 2 than one would.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)
    target = tl.load(targets_ptr + rows * stride_tm, mask=mask_m, other=ignore_index)
    counts = target != ignore_index
    in_range = (target >= 0) & (target < V)
    label = tl.where(in_range, target, -1).to(tl.int32)[:, None]

    lane = tl.arange(0, LANES)[None, :]
    main = tl.arange(0, MAIN)[:, None, None] * LANES
    tail = (MAIN + tl.arange(0, TAIL)[:, None, None]) * LANES
    mask = mask_m[:, None]
    mask_t = mask & (tail + lane < V)
    ptrs = logits_ptr + (rows * stride_zm)[:, None] + lane
    z = tl.load(ptrs + main, mask=mask, other=0.0).to(tl.float32)
    z_t = tl.load(ptrs + tail, mask=mask_t, other=float("-inf")).to(tl.float32)
    m = tl.max(tl.maximum(tl.max(z, 0), tl.max(z_t, 0)), 1)
    m = tl.where(m == float("-inf"), 0.0, m)
    e, e_t = _exp(z - m[:, None]), _exp(z_t - m[:, None])
    l = tl.sum(tl.sum(e, 0) + tl.sum(e_t, 0), 1)
    is_label, is_label_t = main == label - lane, tail == label - lane
    picked = tl.sum(tl.where(is_label, z, 0.0), 0) + tl.sum(tl.where(is_label_t, z_t, 0.0), 0)
    loss = tl.log(l) - (tl.sum(picked, 1) - m)
    loss = tl.where(in_range, loss, float("nan"))
    tl.store(losses_ptr + rows, tl.where(counts, loss, 0.0), mask=mask_m)
    if GRADIENT:
        scale = tl.where(in_range, 1.0, float("nan"))
        if SCALED:
            scale *= tl.load(scales_ptr + rows, mask=mask_m, other=0.0)
        scale = tl.where(counts, scale, 0.0)[:, None]
        factor = scale / l[:, None]
        dz = e * factor - tl.where(is_label, scale, 0.0)
        dz_t = e_t * factor - tl.where(is_label_t, scale, 0.0)
        ptrs = dlogits_ptr + (rows * stride_dm)[:, None] + lane
        tl.store(ptrs + main, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)
        tl.store(ptrs + tail, dz_t.to(dlogits_ptr.dtype.element_ty), mask=mask_t)


@jit
def _long_cross_entropy_kernel(
    logits_ptr,  # arguments as above
    targets_ptr,
    scales_ptr,
    losses_ptr,
    dlogits_ptr,
    stride_zm,
    stride_tm,
    gap_dm,  # stride_dm - stride_zm: of 0 the compiler knows that it keeps the alignment
    V,
    ignore_index,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    LANES: tl.constexpr,
):
    """The same of long rows: each of LANES threads has a sum of its own.

    Program i owns row i from the last: what the product wrote last is still in the L2.

    Rows of odd V are not aligned, but the granules of 8 elements in the midst of each are: they
    move in 16 bytes, and the up to 7 elements on either side, the edges, one by one.
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    target = tl.load(targets_ptr + row * stride_tm)
    counts = target != ignore_index
    in_range = (target >= 0) & (target < V)
    label = tl.where(in_range, target, -1).to(tl.int32)

    first = row * stride_zm
    start = ((first + 7) >> 3) * 8
    head = (start - first).to(tl.int32)
    middle = ((V - head) >> 3) * 8
    offs = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    edge = tl.arange(0, 16)
    edge = tl.where(edge < 8, edge, head + middle + edge - 8)
    mask_e = edge < tl.where(tl.arange(0, 16) < 8, head, V)
    # Every thread has passed the barriers of the reductions below before any overwrites them.
    z_e = tl.load(logits_ptr + first + edge, mask=mask_e, other=float("-inf")).to(tl.float32)
    picked = tl.load(logits_ptr + first + target, mask=in_range, other=0.0).to(tl.float32)

    m_lane = tl.full((LANES,), float("-inf"), tl.float32)
    l_lane = tl.zeros((LANES,), tl.float32)
    for low in range(0, middle, LANES * 8):
        mask = low + offs < middle
        z = tl.load(logits_ptr + start + low + offs, mask=mask, other=float("-inf"))
        z = z.to(tl.float32)
        m_new = tl.maximum(m_lane, tl.max(z, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_lane = l_lane * _exp(m_lane - m_safe) + tl.sum(_exp(z - m_safe[:, None]), 1)
        m_lane = m_new
    m = tl.maximum(tl.max(m_lane, 0), tl.max(z_e, 0))
    m = tl.where(m == float("-inf"), 0.0, m)
    e_e = _exp(z_e - m)
    l = tl.sum(l_lane * _exp(m_lane - m), 0) + tl.sum(e_e, 0)
    loss = tl.log(l) - (picked - m)
    loss = tl.where(in_range, loss, float("nan"))
    tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        scale = tl.where(in_range, 1.0, float("nan"))
        if SCALED:
            scale *= tl.load(scales_ptr + row)
        scale = tl.where(counts, scale, 0.0)
        factor = scale / l
        dlogits_ptr += row * gap_dm
        for low in range(0, middle, LANES * 8):
            mask = low + offs < middle
            z = tl.load(logits_ptr + start + low + offs, mask=mask, other=0.0).to(tl.float32)
            dz = _exp(z - m) * factor - tl.where(low + offs == label - head, scale, 0.0)
            dz = dz.to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + start + low + offs, dz, mask=mask)
        dz_e = e_e * factor - tl.where(edge == label, scale, 0.0)
        tl.store(dlogits_ptr + first + edge, dz_e.to(dlogits_ptr.dtype.element_ty), mask=mask_e)


@jit
def _reduce_losses_kernel(
    losses_ptr,  # (M,) float32
    targets_ptr,  # (M,) int64
    loss_ptr,  # () float32
    factor_ptr,  # () float32: 1 / N of the mean, else 1
    stride_tm,
    M,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sum or mean of the losses: one program, one order of additions."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    number = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = rows < M
        target = tl.load(targets_ptr + rows * stride_tm, mask=mask, other=ignore_index)
        total += tl.load(losses_ptr + rows, mask=mask, other=0.0)
        number += (target != ignore_index).to(tl.int32)
    loss = tl.sum(total, 0)
    factor = 1.0
    if MEAN:
        N = tl.sum(number, 0).to(tl.float32)
        factor = 1.0 / tl.maximum(N, 1.0)
        loss = tl.where(N > 0, loss / tl.maximum(N, 1.0), float("nan"))
    tl.store(loss_ptr, loss)
    tl.store(factor_ptr, factor)


@jit
def _scale_kernel(
    x_ptr,  # (M, K), contiguous
    gradient_ptr,  # (M,), or one element with stride_gm = 0
    factor_ptr,  # () float32
    y_ptr,  # (M, K), contiguous
    stride_gm,
    M,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x * gradient * factor: program i owns one tile of BLOCK_M rows and BLOCK_K columns."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = (tl.program_id(0) % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = rows.to(tl.int64)
    mask = (rows < M)[:, None] & (offs_k < K)[None, :]
    gradient = tl.load(gradient_ptr + rows * stride_gm, mask=rows < M, other=0.0)
    scale = gradient.to(tl.float32) * tl.load(factor_ptr)
    offsets = rows[:, None] * K + offs_k[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, (x * scale[:, None]).to(y_ptr.dtype.element_ty), mask=mask)


SHORT_ROWS = 1024  # the longest V that `_cross_entropy_kernel` keeps in registers


def short_plan(V: int) -> dict[str, int]:
    """Tiles of `_cross_entropy_kernel`: 8 to 64 threads a row, two rows a thread.

    Four threads a row would take fewer instructions (25 an element, not 33, at V = 65 on sm_90),
    but fill only a quarter of each sector of memory with a store. 256 threads, AMD's, share no
    element: in place, one might read what another has overwritten.
    """
    LANES = min(next_power_of_2(V + 1) // 2, max(8, next_power_of_2(V) // 16))
    pieces = -(-V // LANES)
    MAIN = max(1, next_power_of_2(pieces) // 2)
    TAIL = next_power_of_2(pieces - MAIN)
    return {"BLOCK_M": 256 // LANES, "LANES": LANES, "MAIN": MAIN, "TAIL": TAIL, "num_warps": 4}


def long_plan(V: int) -> dict[str, int]:
    """Tiles of `_long_cross_entropy_kernel`: 16 logits a thread, about V / 2 or 8192 a program.

    The larger the programs, the fewer rows are under way at once, and the more of them the second
    pass finds in the L2: 132 x 3 rows of 100 KB on an H200 at V = 50257 in 16 bits.
    """
    LANES = min(1024, next_power_of_2(V) // 16)
    return {"LANES": LANES, "num_warps": LANES // 64}


def launch_cross_entropy(logits, targets, scales, losses, dlogits, ignore_index):
    """Losses (M,) of logits (M, V) and, if `dlogits` is given, their gradients times `scales`."""
    M, V = logits.shape
    modes = {"GRADIENT": dlogits is not None, "SCALED": scales is not None}
    scales = losses if scales is None else scales
    dlogits = logits if dlogits is None else dlogits
    tensors = logits, targets, scales, losses, dlogits
    stride_zm, stride_tm, stride_dm = (x.stride(0) for x in (logits, targets, dlogits))
    if V > SHORT_ROWS:
        strides = stride_zm, stride_tm, stride_dm - stride_zm
        options = modes | long_plan(V)
        launch(_long_cross_entropy_kernel, (M,), *tensors, *strides, V, ignore_index, **options)
    else:
        strides, options = (stride_zm, stride_tm, stride_dm), modes | short_plan(V)
        grid = (-(-M // options["BLOCK_M"]),)
        launch(_cross_entropy_kernel, grid, *tensors, *strides, M, V, ignore_index, **options)


def launch_reduce(losses, targets, ignore_index, reduction):
    """(loss, factor): the sum or mean, and what turns the gradient of the sum into its own."""
    loss, factor = losses.new_empty(()), losses.new_empty(())
    launch(
        _reduce_losses_kernel,
        (1,),
        losses,
        targets,
        loss,
        factor,
        targets.stride(0),
        losses.shape[0],
        ignore_index,
        MEAN=reduction == "mean",
        BLOCK_M=8192,
        num_warps=16,
    )
    return loss, factor


def launch_scale(x, gradient, factor, y):
    """y = x * gradient * factor; gradient () or one element for each row of x."""
    M, K = x.shape if gradient.ndim else (1, x.numel())
    BLOCK_K = min(2048, max(16, next_power_of_2(K)))
    BLOCK_M = 2048 // BLOCK_K if M > 1 else 1
    launch(
        _scale_kernel,
        (-(-M // BLOCK_M) * -(-K // BLOCK_K),),
        x,
        gradient,
        factor,
        y,
        gradient.stride(0) if gradient.ndim else 0,
        M,
        K,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        num_warps=4,
    )
