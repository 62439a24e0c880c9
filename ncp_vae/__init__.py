"""Noise contrastive priors for VAEs. The names of `dir(ncp_vae)` are loaded when they are asked for."""
__version__ = "0.1.0"

from importlib import import_module as _import_module

_NAMES = {name: place for place, names in {
    "walk": "Step Trace TopDownVAE FlatVAE WithPriors from_prior from_posterior replay",
    "bound": "elbo iwae",
    "nce": "nce_loss jsd_from_loss RatioEstimator",
    "prior": "ReweightedPrior NoiseContrastivePrior",
    "sampling": "SIR Langevin MALA HMC JointLangevin JointMALA SMC proposal_budget effective_sample_size",
    "models.priors": "GaussianMixture",
    "models.ratios": "MLPRatio ConvRatio",
    "engine.data": "load",
    "engine.evaluate": "compare",
    "engine.train": "fit_vae fit_ncp",
}.items() for name in names.split()}


def __getattr__(name):
    if name not in _NAMES:
        raise AttributeError(f"module 'ncp_vae' has no attribute {name!r}; it has {', '.join(_NAMES)}")
    return getattr(_import_module(f"ncp_vae.{_NAMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_NAMES])
