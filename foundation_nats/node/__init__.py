"""One process in the cluster; hosts a `Workload`, never an agent."""
