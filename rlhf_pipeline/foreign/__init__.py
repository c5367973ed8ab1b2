"""The keys of other tools and what they mean in this package: one table per tool."""
