"""Stand-ins for what ModelSwapper meets in production: AI providers, and AutoModel."""
