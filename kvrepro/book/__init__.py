"""The book: notebooks run through papermill when something they depend on changed, then pages built by Jupyter Book.

:func:`kvrepro.book.build.build` does both for a profile, :func:`kvrepro.book.build.run` runs one notebook with
parameters of one's own. What a page depends on is written beside it in a stamp (:mod:`kvrepro.book.stamps`), so that a
second build does nothing and an interrupted one goes on. Building needs the extra ``kvrepro[book]``; the list of
notebooks does not.
"""

from kvrepro.book.project import PROFILES, BookError, Notebook, Project, RequestError

__all__ = ["PROFILES", "BookError", "Notebook", "Project", "RequestError"]
