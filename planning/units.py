"""Numbers formatted for people: bytes in powers of ten, as data sheets have them."""


def gigabytes(size: float) -> str:
    """In GB; what is smaller than a hundredth of one in a unit that fits."""
    if abs(size) < 1e7:
        return amount(size)
    return f"{size / 1e9:,.2f} GB" if abs(size) < 1e10 else f"{size / 1e9:,.1f} GB"


def amount(size: float) -> str:
    """Bytes in the unit that fits: 312 B, 4.1 kB, 17 MB, 2.40 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:,.3g} {unit}" if size < 1e12 else f"{size / scale:,.0f} {unit}"
    return f"{size:,.0f} B"


def seconds(time: float) -> str:
    """A duration in the unit that fits: 81 us, 4.2 ms, 1.30 s."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if time >= scale:
            return f"{time / scale:.3g} {unit}"
    return f"{time * 1e6:.3g} us"


def flop(count: float) -> str:
    """FLOPs in the unit that fits: 3.2 TFLOP."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:,.3g} {unit}"
    return f"{count / 1e6:,.3g} MFLOP"
