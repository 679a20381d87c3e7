from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("datasets", "0001_initial")]

    operations = [
        migrations.AddField(
            model_name="dataset",
            name="licence",
            field=models.CharField(
                blank=True, default="", help_text="As workers.licences names it; empty: unknown.", max_length=80
            ),
            preserve_default=False,
        ),
    ]
