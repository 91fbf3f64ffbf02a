"""What good means: principles, the requests built from them, verdicts and scores. Text and arithmetic only."""
