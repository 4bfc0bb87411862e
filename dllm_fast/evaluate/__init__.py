"""Evaluation: lm-eval's model, likelihoods, and checks against published figures."""
