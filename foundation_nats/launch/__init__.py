"""Starting and ending nodes from afar: on this machine, by commands, or as a package knows how."""
