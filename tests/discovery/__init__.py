"""Finding servers, with real resolvers, sockets and files."""
