"""The three papers' own models and data for the profile ``paper``: one table, and what gets everything in it.

``table`` reads ``kvrepro/data/papers.yml``, ``hub`` gets single files and goes on where it stopped, ``convert`` puts
datasets into the layout that ``kvrepro.texts`` and ``kvrepro.tasks`` read, ``fetch`` does it all for a folder.
"""
