"""An example of a user's own rewards, for `vlmalign align`: functions of the completions of a batch and of the columns of
the prompts' rows, one entry per completion in each. A reward gives a number per completion, or None where it does not
apply. Its code runs as you: it is taken only from the config that you name on the command line."""


def named_in_reasoning(prompts, completions, *, truth, bonus=1.0, **columns):
    """`bonus` times the share of the true labels that the reasoning names before the solution."""
    found = []
    for completion, labels in zip(completions, truth, strict=True):
        reasoning = completion.partition("<solution>")[0].lower()
        found.append(bonus * sum(label.lower() in reasoning for label in labels) / len(labels))
    return found
