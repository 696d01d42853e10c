"""Proof under fault: workload, nemesis, history, checkers, verdict; seeded and repeatable in its plan.

Five roles, as in Jepsen: a *workload* makes operations, a *nemesis* makes
trouble, a *history* records what every client saw, *checkers* judge it, and a
*campaign* runs rounds of them. A round is one seed: its plan of faults is
decided before it begins (the timing of processes is not). A run that was too
quiet to mean anything is void, which is no pass.

`foundation chaos` runs it; `docs/reliability.md` holds the latest figures.
"""
