"""Every message between processes, in one union per direction."""

from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import (
    Abandon,
    Attach,
    Attached,
    Await,
    Awaited,
    Drain,
    DrainState,
    Events,
    Existing,
    Exists,
    Lease,
    Leased,
    ListPins,
    Pin,
    PinList,
    Pinned,
    Prefetch,
    PrefetchCancel,
    PrefetchPoll,
    PrefetchState,
    Publish,
    Published,
    Release,
    Renew,
    Reserve,
    Reserved,
    Revoke,
    Snapshot,
    Subscribe,
    TierList,
    Tiers,
    Unpin,
)
from tracehaul.wire.cluster import (
    AskRouter,
    Flip,
    Flipped,
    GiveTrace,
    Heartbeat,
    Join,
    Members,
    MembersChanged,
    Objection,
    RouterAnswered,
    TraceGiven,
)
from tracehaul.wire.operations import (
    Describe,
    Description,
    Discard,
    Limits,
    Locate,
    Located,
    Scrub,
    ScrubCancel,
    ScrubPoll,
    ScrubState,
    SetLimits,
)
from tracehaul.wire.steps import (
    DecodeStep,
    ForgetContext,
    KeepContext,
    PrefillDone,
    PrefillProgress,
    PrefillStep,
    PrefillToken,
    RecallContext,
    Resident,
    StepDone,
    Tokens,
)

Request = (
    Join
    | Heartbeat
    | Flip
    | GiveTrace
    | AskRouter
    | Ping
    | Reserve
    | Publish
    | Abandon
    | Renew
    | Lease
    | Release
    | Exists
    | Revoke
    | Await
    | Pin
    | Unpin
    | ListPins
    | Attach
    | Subscribe
    | Tiers
    | Prefetch
    | PrefetchPoll
    | PrefetchCancel
    | Describe
    | SetLimits
    | Locate
    | Discard
    | Scrub
    | ScrubPoll
    | ScrubCancel
    | Drain
    | PrefillStep
    | DecodeStep
    | KeepContext
    | RecallContext
    | ForgetContext
)
Reply = (
    Ok
    | Members
    | MembersChanged
    | Objection
    | Flipped
    | TraceGiven
    | RouterAnswered
    | Reserved
    | Published
    | Leased
    | Existing
    | Awaited
    | Pinned
    | PinList
    | Attached
    | Snapshot
    | Events
    | TierList
    | PrefetchState
    | Description
    | Limits
    | Located
    | ScrubState
    | DrainState
    | PrefillProgress
    | PrefillToken
    | PrefillDone
    | Tokens
    | StepDone
    | Resident
)
