"""Commands, thin: parse, call a service, print. One file a command; torch is imported only once one runs."""
