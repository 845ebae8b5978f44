"""Every metric by name, with its unit and what it means. ``docs/metrics.md`` is made from this.

Rooms count in plain structs and know nothing of metrics: here each field gets its name. A field that is not here is
shown all the same, under its own name; a test says so.
"""

from collections.abc import Iterator

from cluster.metric import Kind, Metric

COUNTERS: dict[str, dict[str, Metric]] = {
    "StoreStats": {
        "reserved": Metric("reserved_blocks", "blocks", "Slots given to writers."),
        "in_flight": Metric("in_flight_blocks", "blocks", "Blocks not given to a writer: another was writing them."),
        "full": Metric("refused_blocks", "blocks", "Blocks of writers for which no slot could be freed."),
        "published": Metric("published_blocks", "blocks", "Blocks that became visible."),
        "fenced": Metric("fenced_blocks", "blocks", "Publishes refused because their reservation had ended."),
        "corrupt_writes": Metric(
            "corrupt_writes", "blocks", "Publishes refused because the landed bytes did not match."
        ),
        "corrupt_held": Metric("corrupt_held_blocks", "blocks", "Published blocks dropped: their bytes had changed."),
        "leased_blocks": Metric("leased_blocks", "blocks", "Blocks given to readers under a lease."),
        "missed_blocks": Metric("missed_blocks", "blocks", "Blocks that readers asked for and that were not held."),
        "waits": Metric("waits", "requests", "Requests that waited for a block that another was writing."),
        "passed_on": Metric("passed_on_blocks", "blocks", "Reservations of a silent writer that went to another."),
        "pins_refused": Metric("refused_pins", "requests", "Pins refused because a limit was reached."),
        "leases_refused": Metric("refused_leases", "requests", "Leases refused: too many on one connection."),
    },
    "TierStats": {
        "stored": Metric("stored_blocks", "blocks", "Blocks written to the tier."),
        "stored_bytes": Metric("stored_bytes", "bytes", "Bytes of the blocks written to the tier."),
        "loaded": Metric("loaded_blocks", "blocks", "Blocks read from the tier, verified."),
        "loaded_bytes": Metric("loaded_bytes", "bytes", "Bytes of the blocks read from the tier."),
        "full": Metric("refused_blocks", "blocks", "Blocks not written: nothing in the tier could make room."),
        "evicted": Metric("evicted_blocks", "blocks", "Blocks that made room for others."),
        "corrupt": Metric("corrupt_blocks", "blocks", "Blocks dropped because their bytes did not match."),
        "failed": Metric("failed_operations", "operations", "Reads and writes that the tier's device refused."),
        "recovered": Metric("recovered_blocks", "blocks", "Blocks found at the node's start."),
        "unreadable": Metric("unreadable_records", "records", "Records found torn or outdated at the node's start."),
        "scrubbed": Metric("scrubbed_blocks", "blocks", "Blocks verified by the scrubber or by a scrub on demand."),
    },
    "TieringStats": {
        "demoted": Metric("demoted_blocks", "blocks", "Blocks that left memory and stayed in the tier below."),
        "evicted_unwritten": Metric("evicted_unwritten_blocks", "blocks", "Blocks evicted before they were written."),
        "promoted": Metric("promoted_blocks", "blocks", "Blocks brought to memory."),
        "promote_failed": Metric(
            "promote_failed_blocks", "blocks", "Blocks asked for that were bad or lost their slot."
        ),
        "promote_refused": Metric(
            "promote_refused_blocks", "blocks", "Blocks not brought up: no slot, too many coming, or no answer."
        ),
        "promote_late": Metric("promote_late_leases", "requests", "Leases that did not wait for all their blocks."),
    },
    "StackStats": {
        "copied_down": Metric("copied_down_blocks", "blocks", "Blocks copied from the disk to the tier below it."),
        "copied_up": Metric("copied_up_blocks", "blocks", "Blocks copied back to the disk."),
        "evicted_uncopied": Metric("evicted_uncopied_blocks", "blocks", "Blocks evicted from disk before their copy."),
    },
    "CopyStats": {
        "blocks": Metric("copied_blocks", "blocks", "Blocks written to another store node."),
        "bytes": Metric("copied_bytes", "bytes", "Bytes of those blocks."),
        "present": Metric("present_blocks", "blocks", "Blocks that the other node turned out to have."),
        "refused": Metric("refused_blocks", "blocks", "Blocks that the other node had no room for."),
        "failed": Metric("failed_blocks", "blocks", "Blocks that did not get to the other node."),
        "corrupt": Metric("corrupt_blocks", "blocks", "Blocks that the other node found bad."),
    },
    "ReplicaStats": {
        "made": Metric("made", "pins", "Times that another node took a pin and all that is here of its blocks."),
        "refused": Metric("refused", "pins", "Times that one did not."),
        "pins_refused": Metric("refused_pins", "pins", "Of these, because it did not take the pin."),
    },
    "JournalStats": {
        "recovered": Metric("recovered", "pins", "Pins found at the node's start and still in force."),
        "appended": Metric("appended_entries", "entries", "Entries added to the journal of pins."),
        "rewritten": Metric("rewrites", "rewrites", "Times that the journal was written anew to make it shorter."),
        "failed": Metric("failed_entries", "entries", "Entries that the device refused: their callers were told."),
    },
    "ClientStats": {
        "hits": Metric("hit_blocks", "blocks", "Blocks got, landed and verified."),
        "misses": Metric("missed_blocks", "blocks", "Blocks not got.", ("reason",)),
        "puts": Metric("puts", "blocks", "Blocks put, by what came of it.", ("reason",)),
        "get_bytes": Metric("get_bytes", "bytes", "Bytes of the blocks got."),
        "get_s": Metric("get_seconds", "seconds", "Time in gets, those side by side added up."),
        "put_bytes": Metric("put_bytes", "bytes", "Bytes of the blocks published."),
        "put_s": Metric("put_seconds", "seconds", "Time in puts, those side by side added up."),
        "failovers": Metric("failovers", "nodes", "Nodes that failed in the middle of a put."),
        "hits_failed_over": Metric("failed_over_blocks", "blocks", "Blocks got from another node than the first."),
    },
    "AdapterStats": {
        "steps": Metric("steps", "steps", "Steps begun over a stock server."),
        "steps_failed": Metric("steps_failed", "steps", "Steps that ended with an error."),
        "steps_aborted": Metric("steps_aborted", "steps", "Steps that their caller gave up."),
        "prompt_tokens": Metric("prompt_tokens", "tokens", "Tokens of the steps' prompts."),
        "output_tokens": Metric("output_tokens", "tokens", "Tokens told."),
        "device_tokens": Metric("device_tokens", "tokens", "Prompt tokens that the engine had in its own memory."),
        "host_tokens": Metric("host_tokens", "tokens", "Prompt tokens that it had in its host's memory."),
        "store_tokens": Metric("store_tokens", "tokens", "Prompt tokens that it got from the store."),
        "prefill_fallbacks": Metric("prefill_fallbacks", "steps", "Steps whose prefill worker failed: computed here."),
        "handed_off": Metric("handed_off_steps", "steps", "Steps whose prompt a prefill worker was to compute."),
        "stored_late": Metric("stored_late_prompts", "prompts", "Prompts that were not all stored when waited for."),
        "servers_lost": Metric("servers_lost", "servers", "Times that the engine's server was lost."),
        "tokens_again": Metric("tokens_again", "tokens", "Output tokens of a lost router's steps, told to another."),
    },
    "WorkerStats": {
        "steps": Metric("steps", "steps", "Steps begun."),
        "steps_failed": Metric("steps_failed", "steps", "Steps that ended with an error."),
        "steps_aborted": Metric("steps_aborted", "steps", "Steps that their caller gave up."),
        "prompt_tokens": Metric("prompt_tokens", "tokens", "Tokens of the steps' prompts."),
        "output_tokens": Metric("output_tokens", "tokens", "Tokens sampled."),
        "resident_tokens": Metric("resident_tokens", "tokens", "Prompt tokens whose KV was on the worker."),
        "pulled_tokens": Metric("pulled_tokens", "tokens", "Prompt tokens whose KV came from the store."),
        "pulled_bytes": Metric("pulled_bytes", "bytes", "KV pulled from the store."),
        "pull_s": Metric("pull_seconds", "seconds", "Time in pulls, those side by side added up."),
        "missed_blocks": Metric("missed_blocks", "blocks", "Blocks expected from the store that did not arrive."),
        "evicted_sequences": Metric("evicted_sequences", "sequences", "Idle sequences given up for memory."),
        "suspended_steps": Metric("suspended_steps", "steps", "Running steps that gave their memory to older ones."),
        "background_suspended": Metric("background_suspended", "steps", "Those of them of the background."),
        "prefill_fallbacks": Metric("prefill_fallbacks", "steps", "Steps whose prefill worker failed: computed here."),
        "recalled_tokens": Metric("recalled_tokens", "tokens", "Tokens pulled before a step asked for them."),
        "tokens_again": Metric("tokens_again", "tokens", "Output tokens of a lost router's steps, told to another."),
        "write_back_refused": Metric("write_back_refused", "sequences", "Sequences whose blocks no store took."),
    },
    "BillStats": {
        "worker_s": Metric("worker_seconds", "seconds", "Workers' time billed to traces, by its use.", ("reason",)),
        "tenant_worker_s": Metric("tenant_worker_seconds", "seconds", "The same, by tenant.", ("tenant",)),
        "tenant_amount": Metric("tenant_amount", "tariff", "What was billed, in the tariff's unit.", ("tenant",)),
    },
    "DispatchStats": {
        "steps": Metric("steps", "steps", "Steps begun."),
        "steps_finished": Metric("steps_finished", "steps", "Steps that ended well."),
        "steps_failed": Metric("steps_failed", "steps", "Steps that ended with an error."),
        "traces_refused": Metric("traces_refused", "traces", "First steps that were told to come later."),
        "steps_aborted": Metric("steps_aborted", "steps", "Steps that the client, or a stop string, ended."),
        "steps_moved": Metric("steps_moved", "attempts", "Attempts that failed and were followed by another worker's."),
        "steps_replaced": Metric(
            "steps_replaced", "attempts", "Attempts that left a worker's queue for a better place."
        ),
        "steps_waited": Metric("steps_waited", "steps", "Steps that waited in the router for their turn."),
        "waited_s": Metric("waited_seconds", "seconds", "How long all of them did."),
        "steps_again": Metric("steps_again", "steps", "Steps asked for again that began with what they had."),
        "tokens_again": Metric("tokens_again", "tokens", "Output tokens told again, and not sampled again."),
        "prompt_tokens": Metric("prompt_tokens", "tokens", "Tokens of finished steps' prompts."),
        "cached_tokens": Metric("cached_tokens", "tokens", "Of these, those that nobody computed again."),
        "output_tokens": Metric("output_tokens", "tokens", "Tokens of finished steps' answers."),
        "missed_blocks": Metric("missed_blocks", "blocks", "Blocks said to be in the store that did not arrive."),
        "prefill_fallbacks": Metric("prefill_fallbacks", "steps", "Steps whose prefill worker failed."),
        "theoretical_tokens": Metric(
            "theoretical_tokens", "tokens", "Prompt tokens that the step's trace, or its parent, had computed before."
        ),
        "indexed_tokens": Metric("indexed_tokens", "tokens", "Prompt tokens that the stores were said to hold."),
        "chosen_tokens": Metric("chosen_tokens", "tokens", "Prompt tokens expected to be cached where a step was put."),
        "delivered_tokens": Metric("delivered_tokens", "tokens", "Prompt tokens that nobody computed again."),
        "recomputed_tokens": Metric(
            "recomputed_tokens", "tokens", "Of the theoretical ones, those that were computed again.", ("reason",)
        ),
        "pool_steps": Metric("pool_steps", "steps", "Steps that finished.", ("pool",)),
        "pool_prompt_tokens": Metric("pool_prompt_tokens", "tokens", "Of finished steps.", ("pool",)),
        "pool_cached_tokens": Metric(
            "pool_cached_tokens", "tokens", "Of their prompts, those that nobody computed again.", ("pool",)
        ),
        "pool_output_tokens": Metric("pool_output_tokens", "tokens", "Of finished steps.", ("pool",)),
    },
    "AcceptStats": {
        "accepted": Metric("accepted_connections", "connections", "Connections taken."),
        "refused": Metric(
            "refused_connections",
            "connections",
            "Connections closed or answered 503: no descriptor was left, or there were as many as may be.",
            ("reason",),
        ),
    },
    "NotesStats": {
        "unwritten": Metric(
            "unwritten", "writes", "What a node would have noted in the run directory, which did not take it."
        ),
    },
    "OutputStats": {
        "lost": Metric("lost_lines", "lines", "Lines of the log that could not be written."),
    },
    "RetentionStats": {
        "pins": Metric("pins", "requests", "Pins asked of stores for traces between two steps."),
        "pins_refused": Metric("refused_pins", "requests", "Of these, those refused or not answered."),
        "recalls": Metric("recalls", "requests", "Contexts to be brought back to a worker before their step."),
        "recalled_tokens": Metric("recalled_tokens", "tokens", "Tokens that came back so."),
        "recalls_vain": Metric("vain_recalls", "requests", "Recalls that brought nothing: no memory, or not stored."),
        "recalls_cut": Metric("cut_recalls", "requests", "Recalls that the step did not wait for."),
        "prefetches": Metric("prefetches", "requests", "Contexts asked up from below a store's memory."),
        "prefetches_cut": Metric(
            "cut_prefetches", "requests", "Of these, called off: no room for them, or nobody who waits for them."
        ),
        "undone": Metric("undone", "requests", "Left undone: too much was under way."),
    },
}
"""By the struct that a room counts in, and its field."""

COUNTERS["ObjectStats"] = COUNTERS["TierStats"] | {
    "puts": Metric("put_requests", "requests", "Requests to make an object."),
    "gets": Metric("get_requests", "requests", "Requests for an object's bytes."),
    "deletes": Metric("delete_requests", "requests", "Requests to delete, each for up to 1000 objects."),
    "listings": Metric("list_requests", "requests", "Pages of listings of up to 1000 objects, and probes."),
    "lost": Metric("lost_objects", "objects", "Objects that were gone when they were read."),
    "unanswered": Metric(
        "unanswered_blocks",
        "blocks",
        "Reads and writes of blocks that the service did not do; those to be read are kept.",
    ),
    "deleted": Metric("deleted_objects", "objects", "Objects deleted."),
    "useless": Metric("useless_objects", "objects", "Objects found at the start that no block needs: deleted."),
    "outages": Metric("outages", "outages", "Times that the service was given up for a while."),
}

COUNTERS["TraceJournalStats"] = {
    "batches": Metric("batches", "transactions", "Transactions that wrote the journal of traces."),
    "changes": Metric("changes", "changes", "Changes of traces in them."),
    "bytes_written": Metric("written_bytes", "bytes", "What these took."),
    "whole": Metric("whole_changes", "changes", "Of them, traces written whole."),
    "failures": Metric("failures", "transactions", "Times that the store of records did not do what it was asked."),
    "restored": Metric("restored_traces", "traces", "Traces known again when the router started."),
    "unreadable": Metric("unreadable_traces", "traces", "Traces that were there and could not be read."),
    "lost": Metric("lost_traces", "traces", "Changes of traces that another router had taken over: not written."),
}
COUNTERS["HandoverStats"] = {
    "fetched": Metric("fetched_traces", "traces", "Traces of calls that came from other routers."),
    "given": Metric("given_traces", "traces", "Traces that other routers asked for and got."),
    "busy": Metric("busy_traces", "traces", "Traces that stayed with another router, as a step of them ran there."),
    "adopted": Metric("adopted_traces", "traces", "Traces of routers that live no more."),
    "unfetched": Metric("unfetched_calls", "calls", "Calls served without asking what other routers know: too late."),
}
COUNTERS["FlipStats"] = {
    "flipped": Metric("flipped", "workers", "Workers that have another role now, as this router ordered."),
    "refused": Metric("refused", "orders", "Changes of a role that could not be ordered, as the fleet was."),
    "failed": Metric("failed", "orders", "Changes of a role that were ordered and have not come to pass."),
}
COUNTERS["AdaptStats"] = {
    "changes": Metric("changes", "changes", "Changes of a role that this router decided on of its own accord."),
    "kept": Metric("kept", "changes", "Those whose gain came."),
    "unclear": Metric(
        "unclear", "changes", "Those of which nothing can be said, as the work or the fleet has changed."
    ),
    "in_vain": Metric("in_vain", "changes", "Those whose gain did not come."),
    "refused": Metric("refused", "changes", "Those that were not carried out."),
    "taken_back": Metric("taken_back", "changes", "Those in vain that were to be taken back."),
}
COUNTERS["ChatStats"] = {
    "kept": Metric("kept", "completions", "Chat completions kept for clients that asked for it (`store`)."),
    "not_kept": Metric("not_kept", "completions", "Those that were to be kept and are not: the database refused."),
    "forgotten": Metric("forgotten", "completions", "Those that were too old, or beyond a limit."),
}

COUNTERS["WebhookStats"] = {
    "sent": Metric("sent", "events", "Events that receivers of webhooks took."),
    "failed": Metric("failed", "attempts", "Attempts that they did not take."),
    "given_up": Metric("given_up", "events", "Events given up: after all attempts, or too many waited."),
    "not_kept": Metric("not_kept", "events", "Times that one on its way could not be kept in the database."),
}

PARTS = {
    "store": "StoreStats",
    "disk": "TierStats",
    "s3": "ObjectStats",
    "tiering": "TieringStats",
    "stack": "StackStats",
    "copies": "CopyStats",
    "replicas": "ReplicaStats",
    "pins": "JournalStats",
    "store_client": "ClientStats",
    "worker": "WorkerStats",
    "adapter": "AdapterStats",
    "router": "DispatchStats",
    "retention": "RetentionStats",
    "bills": "BillStats",
    "control": "AcceptStats",
    "api": "AcceptStats",
    "notes": "NotesStats",
    "output": "OutputStats",
    "journal": "TraceJournalStats",
    "handover": "HandoverStats",
    "flips": "FlipStats",
    "adapt": "AdaptStats",
    "chats": "ChatStats",
    "webhooks": "WebhookStats",
}
"""What comes after ``tracehaul_``, by struct: the table in the docs."""

LOAD: dict[str, Metric] = {
    "running": Metric("running", "steps", "Steps in progress."),
    "waiting": Metric("waiting", "steps", "Steps queued for memory."),
    "background": Metric("background", "steps", "Of those in progress, steps of the background."),
    "orphans": Metric("orphans", "answers", "What it said to routers that are lost, kept for the next ones."),
    "blocks": Metric("blocks", "blocks", "Published blocks in a store node's memory."),
    "bytes_used": Metric("used_bytes", "bytes", "Bytes of those blocks; on a worker, KV memory in use."),
    "bytes_max": Metric("max_bytes", "bytes", "The most that it can be."),
    "disk_blocks": Metric("disk_blocks", "blocks", "Blocks on a store node's disk."),
    "disk_bytes_used": Metric("disk_used_bytes", "bytes", "Bytes of those blocks."),
    "disk_bytes_max": Metric("disk_max_bytes", "bytes", "The most that it can be."),
    "disk_block_s": Metric("disk_block_seconds", "seconds", "How long a block takes to come into memory from there."),
    "draining": Metric("draining", "nodes", "1 while a store node moves what it holds to others."),
    "serving": Metric("serving", "nodes", "1 while it can do what it is there for."),
    "copies_waiting": Metric("copies_waiting", "blocks", "Blocks still to be copied to other store nodes."),
    "pins_short": Metric("short_pins", "pins", "Pins with fewer copies than they ask for: nobody can take one."),
    "token_s": Metric(
        "token_seconds", "seconds", "Computing one token of a prompt that has nothing before it (worker)."
    ),
    "pair_s": Metric("pair_seconds", "seconds", "What each token before it adds to that (worker)."),
    "decode_s": Metric("decode_seconds", "seconds", "An iteration that only decodes (worker)."),
    "pull_token_s": Metric("pull_token_seconds", "seconds", "Pulling the KV of one token from a store node (worker)."),
    "shared": Metric(
        "shared_share",
        "1",
        "Computing of a worker that is at the cost of others on the same cores, while they compute.",
    ),
    "free_tokens": Metric("free_tokens", "tokens", "KV memory of a worker that nothing is in."),
    "up_s": Metric("up_seconds", "seconds", "How long a worker has been there."),
    "busy_s": Metric("busy_seconds", "seconds", "How much of that its iterations took."),
    "charges": Metric("charges", "accounts", "Of steps and traces, that a worker tells routers of."),
    "s3_blocks": Metric("s3_blocks", "blocks", "Blocks of a store node in its bucket."),
    "s3_bytes_used": Metric("s3_used_bytes", "bytes", "Bytes of those blocks."),
    "s3_bytes_max": Metric("s3_max_bytes", "bytes", "The most that it can be."),
    "s3_block_s": Metric("s3_block_seconds", "seconds", "How long a block takes to come into memory from there."),
}
"""Gauges of every node but the router, ``tracehaul_node_…``: the fields of its heartbeat."""

GAUGES: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("store_slots", "slots", "Slots of a store node's memory, by what they are.", ("state",)),
        Metric("webhooks_waiting", "events", "Events on their way to receivers of webhooks.", ("receiver",)),
        Metric("webhooks_broken", "addresses", "Addresses there that are told nothing for now.", ("receiver",)),
        Metric("workers", "workers", "Workers that may get work, as a router sees them.", ("role",)),
        Metric("journal_behind", "traces", "Traces that are not written down as they are."),
        Metric("journal_failing", "1", "1 while the store of records does not do what it is asked."),
        Metric("store_open_leases", "leases", "Open leases of readers."),
        Metric("store_open_reservations", "blocks", "Blocks that are being written."),
        Metric("store_open_pins", "pins", "Open pins."),
        Metric("store_hard_pinned_blocks", "blocks", "Blocks that hard pins cover, each pin's counted."),
        Metric("store_waiting_requests", "requests", "Requests that wait for blocks that others write."),
        Metric("store_subscribers", "subscribers", "Open subscriptions to the node's events."),
        Metric(
            "store_tenant_used_bytes", "bytes", "Slots that a tenant takes; empty: all without a quota.", ("tenant",)
        ),
        Metric("store_tenant_quota_bytes", "bytes", "What a tenant is sure of; empty: all without one.", ("tenant",)),
        Metric("store_unwritten_blocks", "blocks", "Blocks that wait to be written to the tier below memory."),
        Metric("store_client_staging_buffers", "buffers", "Staging buffers, by what they are.", ("state",)),
        Metric("store_client_staging_quarantined_bytes", "bytes", "Staging that a late transfer may still touch."),
        Metric("transfer_quarantined_bytes", "bytes", "Bytes of transfers past their deadline that may still land."),
    )
}
"""What is so now, beside the load."""

OTHER_COUNTERS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("store_evicted_blocks", "blocks", "Blocks that left a store node's memory to make room."),
        Metric("store_softened_pins", "pins", "Hard pins that outgrew their limits and became soft."),
        Metric("store_scrubbed_blocks", "blocks", "Blocks in memory verified by scrubs on demand."),
        Metric("store_subscriber_overflows", "subscribers", "Subscribers cut off because they fell too far behind."),
        Metric("transfer_refused_connections", "connections", "TCP connections closed at once.", ("reason",)),
        Metric("transfer_dropped_notifications", "messages", "Notifications of peers that made no sense."),
    )
}


def counter_of(part: str, struct: str, field: str) -> Metric:
    """The metric of a counted field, its full name without ``_total``."""
    known = COUNTERS.get(struct, {}).get(field)
    if known is not None:
        return known._replace(name=f"tracehaul_{part}_{known.name}")
    name = f"{field.removesuffix('_s')}_seconds" if field.endswith("_s") else field
    return Metric(f"tracehaul_{part}_{name}", "", f"{field} since the node's start", ("reason",))


def load_of(field: str) -> Metric:
    """The gauge of a heartbeat's field, with its full name."""
    known = LOAD.get(field)
    return (
        known._replace(name=f"tracehaul_node_{known.name}") if known else Metric(f"tracehaul_node_{field}", "", field)
    )


def every() -> Iterator[tuple[Kind, Metric]]:
    """All of them, with their full names, as a page shows them."""
    for part, struct in PARTS.items():
        for field in COUNTERS[struct]:
            metric = counter_of(part, struct, field)
            yield "counter", metric._replace(name=f"{metric.name}_total")
    for metric in OTHER_COUNTERS.values():
        yield "counter", metric._replace(name=f"tracehaul_{metric.name}_total")
    for metric in GAUGES.values():
        yield "gauge", metric._replace(name=f"tracehaul_{metric.name}")
    for field in LOAD:
        yield "gauge", load_of(field)


def document() -> str:
    """``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "Every node answers `/metrics` in Prometheus' text format; `tracehaul status` shows where, the router's is at",
        "its API's port, the others' on the config's `metrics_host`. Counters count since the node's start.",
        "Beside these there are `process_…` and `python_info`.",
        "",
        "This page is made by `python -m cluster.metric_names`, and a test holds it and the nodes to each other.",
        "",
        "| metric | type | unit | labels | |",
        "|---|---|---|---|---|",
    ]
    for kind, metric in sorted(every(), key=lambda one: one[1].name):
        labels = ", ".join(metric.labels)
        lines.append(f"| `{metric.name}` | {kind} | {metric.unit} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")  # noqa: T201 - that is what it is for
