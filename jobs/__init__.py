"""Work that nobody waits for: files, batches of calls, and who answers their lines when.

It knows nothing of who answers: whatever implements :class:`jobs.asking.Asker` does, an endpoint or a
router in process.
"""
