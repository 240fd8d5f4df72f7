"""Make a drafter for a model: data, hidden states, training, evaluation."""
