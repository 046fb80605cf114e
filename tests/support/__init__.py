"""What tests run beside the code: stand-ins for programs that are not here."""
