"""What CLIP says of classes, and what frozen features of earlier images say of them, put together.

Shapes: B images, C classes in question, K of them that images are known of.
"""

from __future__ import annotations

from torch import Tensor


def fuse(logits_BC: Tensor, columns_K: Tensor, log_posterior_BK: Tensor) -> Tensor:
    """Multiply CLIP's probabilities of the classes by those that a Gaussian per class gives them.

    Training-free adaptation adds the two as logits (Wang et al., A hard-to-beat baseline for training-free CLIP-based
    adaptation, arXiv 2402.04087), with a weight to be tuned; here both are probabilities, and the weight is the temperature
    of `DiscriminantSelector.class_posterior`. Where only some of the classes have images, these share anew what CLIP gives
    them together, and the others keep theirs.

    Args:
        logits_BC: cosines times CLIP's logit scale; -inf rules a class out.
        columns_K: which of the C classes have a posterior.
        log_posterior_BK: logarithms of their probabilities.

    Returns:
        Logarithms of probabilities, B x C.
    """
    log_BC = logits_BC.log_softmax(dim=1)
    clip_BK = log_BC[:, columns_K]
    both_BK = clip_BK + log_posterior_BK.to(log_BC)
    share_B1 = clip_BK.logsumexp(dim=1, keepdim=True)
    fused_BK = both_BK - both_BK.logsumexp(dim=1, keepdim=True) + share_B1
    # with all of them ruled out there is nothing to share
    return log_BC.index_copy(1, columns_K, fused_BK.where(share_B1.isfinite(), clip_BK))
