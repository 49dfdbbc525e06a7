"""What is learned from reports: quality per task and model, drift, outages, real token counts.

Pure: rows in, rows out. No ORM, clock or settings; every time is in seconds since the epoch and
is passed in. ``state.Learned`` holds the rows (frozen dataclasses, one per table row to be) and
applies events to them; ``Learned.knowledge`` is what ``selection.rank`` reads.
"""
