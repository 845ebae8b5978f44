"""How much each key may ask for: requests and tokens a minute, calls at once. Pure."""

import msgspec

MINUTE_S = 60.0


class Quota(msgspec.Struct, frozen=True):
    """Of one key; None: as much as it likes."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


class Standing(msgspec.Struct, frozen=True):
    """What is left of one kind."""

    limit: int
    remaining: int
    reset_s: float
    """Until all of it is there again."""


class Standings(msgspec.Struct, frozen=True):
    """What is left; None: it has no limit."""

    requests: Standing | None
    tokens: Standing | None


class Refused(msgspec.Struct, frozen=True):
    """It must wait."""

    what: str
    """The limit, as ``20 requests per minute``."""
    retry_after_s: float


class _Bucket:
    """Holds ``limit``, and fills up again in a minute, steadily. May be overdrawn."""

    def __init__(self, now_s: float) -> None:
        self._taken = 0.0
        self._at_s = now_s

    def taken(self, limit: int, now_s: float) -> float:
        """Not filled up yet."""
        self._taken = max(0.0, self._taken - limit * (now_s - self._at_s) / MINUTE_S)
        self._at_s = now_s
        return self._taken

    def take(self, limit: int, now_s: float, count: float) -> None:
        self._taken = self.taken(limit, now_s) + count

    def wait_s(self, limit: int, now_s: float) -> float:
        """Until one can be taken; 0: now."""
        return max(0.0, (self.taken(limit, now_s) + 1 - limit) * MINUTE_S / limit)

    def standing(self, limit: int, now_s: float) -> Standing:
        taken = self.taken(limit, now_s)
        return Standing(limit, max(0, int(limit - taken)), taken * MINUTE_S / limit)


class _Account:
    def __init__(self, now_s: float) -> None:
        self.requests = _Bucket(now_s)
        self.tokens = _Bucket(now_s)
        self.running = 0


class Limiter:
    """Counts by the keys' ids, for as long as they use anything.

    A request counts when it begins. A prompt's tokens count when it is accepted and the answer's when it ends, so what
    begins while some are left may overdraw; whatever comes then waits until that is made up for.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def begin(self, key: str, quota: Quota, now_s: float) -> Refused | None:
        """A request; None: it may go on, until :meth:`end`."""
        account = self._account(key, now_s)
        requests, tokens = quota.requests_per_minute, quota.tokens_per_minute
        if quota.concurrency is not None and account.running >= quota.concurrency:
            return Refused(f"{quota.concurrency} requests at once", 1.0)
        if requests is not None and (wait_s := account.requests.wait_s(requests, now_s)) > 0:
            return Refused(f"{requests} requests per minute", wait_s)
        if tokens is not None and (wait_s := account.tokens.wait_s(tokens, now_s)) > 0:
            return Refused(f"{tokens} tokens per minute", wait_s)
        if requests is not None:
            account.requests.take(requests, now_s, 1)
        account.running += 1
        return None

    def go_on(self, key: str, now_s: float) -> None:
        """What a request began runs after it, until :meth:`end`."""
        self._account(key, now_s).running += 1

    def spend(self, key: str, quota: Quota, tokens: int, now_s: float) -> None:
        """It used these."""
        if quota.tokens_per_minute is not None:
            self._account(key, now_s).tokens.take(quota.tokens_per_minute, now_s, tokens)

    def end(self, key: str) -> None:
        """A request that began, or what went on of it, is over."""
        account = self._accounts[key]
        assert account.running > 0
        account.running -= 1

    def standings(self, key: str, quota: Quota, now_s: float) -> Standings:
        """What is left."""
        account = self._account(key, now_s)
        requests, tokens = quota.requests_per_minute, quota.tokens_per_minute
        return Standings(
            None if requests is None else account.requests.standing(requests, now_s),
            None if tokens is None else account.tokens.standing(tokens, now_s),
        )

    def keep(self, keys: frozenset[str]) -> None:
        """Forget those that are not among these, and do nothing."""
        self._accounts = {key: a for key, a in self._accounts.items() if key in keys or a.running}

    def _account(self, key: str, now_s: float) -> _Account:
        return self._accounts.setdefault(key, _Account(now_s))
