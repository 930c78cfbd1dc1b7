"""From a results folder to tables, fits with intervals, figures and a report. It must know neither torch nor Ray, and
starts fast.

>>> import analysis
>>> trials = analysis.load_trials("results/allocation-quick")  # doctest: +SKIP
>>> fit = analysis.fit_allocation(analysis.split_cells(trials)[0].trials)  # doctest: +SKIP
>>> print(fit.summary())  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(
    __name__, __file__
)  # the public names are listed in __init__.pyi
