"""One model on a bench: prompts, samples, scores, exact figures."""
