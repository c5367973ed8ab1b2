"""What goes wrong while a stage trains, by name: watches over its figures, and what each usually means."""
