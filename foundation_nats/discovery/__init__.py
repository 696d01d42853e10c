"""Where the NATS servers are: locators become URLs; NATS itself does the rest."""
