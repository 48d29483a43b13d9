"""What tests share: real ranks, fake distributions, broken transports, the pages of the documentation."""
