"""Runs recipes on the same emulated network and compares them: ``python -m launch.compare --help``.

``plan`` says what runs in which order, ``execute`` runs it in a lab, ``analyse`` turns the files that
runs have left into figures, ``report`` and ``plots`` write them down.
"""
