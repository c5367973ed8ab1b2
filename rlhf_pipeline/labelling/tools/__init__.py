"""Project files of other labelling tools: Argilla and Label Studio."""
