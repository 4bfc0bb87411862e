"""Evaluation: lm-eval's model, likelihoods, checks against published figures."""
