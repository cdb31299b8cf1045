"""A batch job of a cluster as the machine that a server runs on: submitted, waited for, reached, ended.

Begin at :mod:`cluster_job`; a scheduler's words are in a module of its own (:mod:`slurm`).
"""
