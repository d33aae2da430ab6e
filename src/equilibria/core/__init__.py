"""Fixed points: states, maps, the loop, and the interfaces of solvers and gradient rules. Imports torch only."""
