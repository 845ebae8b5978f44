"""Whose the time of a stock server is, as far as that can be known from outside: while it has requests, each of them
has an equal part. Pure."""

from worker.meter import Account, Meter


class Sharing:
    """One server's requests, charged to their steps."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._decodes: dict[Account, bool] = {}
        """Those that it has, and whether their first token was told."""
        self._settled_s = 0.0

    def begins(self, account: Account, now_s: float) -> None:
        """It is sent a request."""
        self.settle(now_s)
        self._decodes[account] = False

    def said(self, account: Account, cached_tokens: int, now_s: float) -> None:
        """It has told tokens, or that so many of the prompt were cached: the rest was computed."""
        self.settle(now_s)
        if self._decodes.get(account):
            return
        self._decodes[account] = True
        computed = account.prompt_tokens - cached_tokens
        again = min(account.known_tokens, account.prompt_tokens) - cached_tokens
        if computed > 0 and again > 0:
            account.recompute_s += account.prefill_s * again / computed
            account.prefill_s -= account.prefill_s * again / computed

    def ends(self, account: Account, now_s: float) -> None:
        """It has it no more."""
        self.settle(now_s)
        del self._decodes[account]

    def settle(self, now_s: float) -> None:
        """Charge the time up to now."""
        passed_s, self._settled_s = now_s - self._settled_s, now_s
        if not self._decodes or passed_s <= 0:
            return
        self._meter.busy_s += passed_s
        for account, decodes in self._decodes.items():
            share_s = passed_s / len(self._decodes)
            if decodes:
                account.decode_s += share_s
            else:
                account.prefill_s += share_s
            account.changed_s = now_s
