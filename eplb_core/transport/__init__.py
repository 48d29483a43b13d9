"""The toolbox of a backend's author: queues, checks of sizes, copies, deadlines."""
