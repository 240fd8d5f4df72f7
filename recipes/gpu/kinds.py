"""Prompts of the kinds that chats have few of: ``python kinds.py TEXTS.jsonl [COUNT] > kinds.jsonl``.

Translation both ways, summaries, questions about passages, maths, short questions. TEXTS is what
``texts.py`` made of the model's own texts; the rest are templates. None is taken from what drafters are
measured with.
"""
# ruff: noqa: E501

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "smollm2-135m-instruct"))
import prompts as p

SEED = 20261127
# Who, did what, where or when; every line of a language can follow every other.
FOREIGN = {
    "German": (
        "Mein Bruder|Die Lehrerin|Unser Nachbar|Der alte Bäcker|Ihre Tochter|Die Regierung|Der Arzt|Ein junger Forscher|Die Polizei|Das Unternehmen",
        "hat ein neues Buch gekauft|hat den Brief nicht gelesen|wird nächste Woche nach Hause kommen|möchte mehr über das Thema wissen|hat die Arbeit endlich beendet|wollte gestern ins Kino gehen|konnte die Frage nicht beantworten|hat uns zum Essen eingeladen|muss heute länger arbeiten|hat das Problem schnell gelöst",
        "weil es so wichtig war|obwohl die Zeit knapp war|bevor der Regen begann|und alle waren zufrieden|aber niemand hat es bemerkt|wie die Zeitung berichtet|nachdem die Sitzung vorbei war|und das Wetter war schön|damit die Kinder nicht warten müssen",
    ),
    "French": (
        "Mon frère|La maîtresse|Notre voisin|Le vieux boulanger|Sa fille|Le gouvernement|Le médecin|Une jeune chercheuse|La police|L'entreprise",
        "a acheté un nouveau livre|n'a pas lu la lettre|va rentrer à la maison la semaine prochaine|veut en savoir plus sur le sujet|a enfin terminé le travail|voulait aller au cinéma hier|n'a pas pu répondre à la question|nous a invités à dîner|doit travailler plus longtemps aujourd'hui|a vite résolu le problème",
        "parce que c'était très important|même si le temps manquait|avant le début de la pluie|et tout le monde était content|mais personne ne l'a remarqué|selon le journal|après la fin de la réunion|et il faisait beau|pour que les enfants n'attendent pas",
    ),
    "Spanish": (
        "Mi hermano|La maestra|Nuestro vecino|El viejo panadero|Su hija|El gobierno|El médico|Una joven investigadora|La policía|La empresa",
        "ha comprado un libro nuevo|no ha leído la carta|va a volver a casa la próxima semana|quiere saber más sobre el tema|por fin ha terminado el trabajo|quería ir al cine ayer|no pudo responder a la pregunta|nos ha invitado a cenar|tiene que trabajar más tiempo hoy|ha resuelto el problema rápidamente",
        "porque era muy importante|aunque faltaba tiempo|antes de que empezara la lluvia|y todos estaban contentos|pero nadie se dio cuenta|según el periódico|después de la reunión|y hacía buen tiempo|para que los niños no esperen",
    ),
    "Italian": (
        "Mio fratello|La maestra|Il nostro vicino|Il vecchio fornaio|Sua figlia|Il governo|Il medico|Una giovane ricercatrice|La polizia|L'azienda",
        "ha comprato un libro nuovo|non ha letto la lettera|tornerà a casa la prossima settimana|vuole sapere di più sul tema|ha finalmente finito il lavoro|voleva andare al cinema ieri|non ha potuto rispondere alla domanda|ci ha invitati a cena|deve lavorare più a lungo oggi|ha risolto subito il problema",
        "perché era molto importante|anche se il tempo era poco|prima che iniziasse la pioggia|e tutti erano contenti|ma nessuno se n'è accorto|secondo il giornale|dopo la riunione|e il tempo era bello|così i bambini non devono aspettare",
    ),
}
ASKED = [
    "Translate from {l} into English: {t}",
    "Translate {l} to English: {t}",
    "Translate this {l} sentence to English.\n\n{t}",
    "What does this mean in English? {t}",
    '"{t}" is {l}. Translate it.',
    "{l}: {t}\nEnglish:",
]
QUOTED = ["Passage {n}: {t}", "[{n}] {t}", "Document {n}:\n{t}", "Source {n}. {t}"]
ABOUT = [
    "What does passage {n} say?",
    "What is passage {n} about? Answer briefly.",
    "Which of these texts is the most useful, and why?",
    "What do these texts have in common?",
    "Summarize all of the texts above in two sentences.",
    "Answer from the texts above: what should one do, and why?",
]
OWN = {
    p.math: 4, p.arithmetic: 2, p.reason: 1, p.summarise: 3, p.answer: 3, p.factual: 3, p.translate: 3,
    p.extraction: 1, p.define: 1, p.stem: 1, p.rewrite: 1, p.coding: 2,
}  # fmt: skip


def foreign(chance: random.Random) -> str:
    language, parts = chance.choice(list(FOREIGN.items()))
    text = " ".join(chance.choice(part.split("|")) for part in parts) + "."
    return chance.choice(ASKED).format(l=language, t=text)


def quoted(chance: random.Random, paragraphs: list[str]) -> str:
    form, count = chance.choice(QUOTED), chance.randrange(2, 4)
    texts = [form.format(n=i + 1, t=t) for i, t in enumerate(chance.sample(paragraphs, count))]
    asked = chance.choice(ABOUT).format(n=chance.randrange(1, count + 1))
    return chance.choice(["{t}\n\n{a}", "{a}\n\n{t}"]).format(t="\n\n".join(texts), a=asked)


def main() -> None:
    chance = random.Random(SEED)
    p.RANDOM.seed(SEED)
    about = [json.loads(line)["turns"] for line in Path(sys.argv[1]).read_text("utf-8").splitlines()]
    parts = {part for turns in about for turn in turns for part in turn.split("\n\n")}
    paragraphs = sorted(part for part in parts if 30 <= len(part.split()) <= 70)
    own = [make for make, weight in OWN.items() for _ in range(weight)]
    for i in range(int(sys.argv[2]) if len(sys.argv) > 2 else 6000):
        if i % 20 < 9:
            turns = about[i % len(about)]
        else:
            makers = [own[chance.randrange(len(own))] for _ in range(6)]
            turns = [make() for make in makers]
            if i % 20 < 12:
                turns = [foreign(chance) for _ in range(3)] + turns[:3]
            elif i % 20 < 15:
                turns[0] = quoted(chance, paragraphs)
        print(json.dumps({"turns": turns}))


main()
