"""What a bench prints: lines, and ratios beside their limits."""


def say(text: str = "") -> None:
    print(text, flush=True)


def ratio(what: str, value: float, target: float, *, at_most: bool = False) -> bool:
    """Print ``value`` beside its ``target``; whether it is kept."""
    good = value <= target if at_most else value >= target
    sign = "≤" if at_most else "≥"
    say(f"  {what}: {value:.2f} (target {sign} {target:.2f}) {'ok' if good else 'MISSED'}")
    return good
