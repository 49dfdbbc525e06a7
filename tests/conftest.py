"""The cast and the stage: a real PostgreSQL, the seeded tiers, a small catalogue."""
