"""What ``stoker doctor`` looks at: the machine, the installation, and plugins by their conformance suites."""
