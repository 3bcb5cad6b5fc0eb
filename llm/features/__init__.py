"""The exact bridge: a convex problem of `theory` on the features of a real model and real text.

For each prompt a finite set of candidate responses (`candidates`), each with its features, the mean
of the last hidden state of the frozen model over the response, and its log-probability (`pooling`).
The policy pi_theta(y|x), proportional to pi_0(y|x) exp(theta . phi(x, y)), makes f_SFT and f_DPO
convex, so that every theorem of `theory.theorems` holds as it stands (`build`). `conflict` measures
how far the two objectives pull apart.
"""
