"""Conversations' user turns, of which the model's answers were part of the default drafter's data.

    python benchmarks/training_prompts.py [COUNT] > prompts.jsonl     # 5,000; the first ones of any count are the same

Combined from templates and subjects, always the same; none is taken from what drafters are measured with.
"""
# ruff: noqa: E501

import json
import random
import sys

SEED = 20261123
RANDOM = random.Random()


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


places = lines("""Lisbon
Kyoto
the Scottish Highlands
Marrakesh
Vancouver
New Zealand's South Island
Istanbul
the Amalfi coast
Cape Town
Iceland
Buenos Aires
Prague
the Norwegian fjords
Vietnam
New Orleans
Mexico City
the Greek islands
Bali
Lake Bled
the Atacama Desert
Edinburgh
Zanzibar
Seoul
the Canadian Rockies
Sicily
Jordan and Petra
Copenhagen
the Azores
Hanoi
Patagonia
Vienna
Tasmania
Chicago
the Black Forest
Cartagena
Nairobi
Sri Lanka
Montreal
the Faroe Islands
Porto
Rajasthan
Budapest
the Galapagos Islands
Seattle
Tallinn
Crete
Taipei
Santa Fe
the Lake District
Oaxaca
Beirut
Singapore
Provence
Madagascar""")
topics = lines("""remote work
school uniforms
public libraries
electric cars
learning an instrument
artificial intelligence in medicine
sleep
urban gardening
social media and teenagers
space exploration
fast fashion
renewable energy
online education
vegetarian diets
video games
tourism
privacy on the internet
homework
city traffic
recycling
volunteering
climate change
exercise
money management for students
self-driving cars
reading books
public transport
zoos
working from a café
the four-day week
tattoos at work
plastic bags
nuclear power
pets in apartments
board games
cooking at home
smartphones in schools
fireworks
museum entrance fees
learning to code
home schooling
minimalism
coffee
ocean pollution
local newspapers
cash and digital payments
single-use packaging
daylight saving time
professional sports
mental health at work
bicycle helmets
night shifts
fan fiction
organic food
gap years
podcasts
open-plan offices
tipping in restaurants
voting at sixteen
universal basic income
online dating
street art
camping
meditation
grandparents and grandchildren
the minimum wage
noise in cities
handwriting
early retirement
smart homes
insects as food
water shortages
chess
high-speed trains
animal testing
subscription services
living abroad
procrastination
friendship in adult life
sugar taxes
electric scooters
reality television
historic buildings
wildlife in cities
part-time jobs for students
artificial intelligence in classrooms
news on social media
dancing
hospital food
repairing instead of buying new
small talk""")
science = lines("""photosynthesis
black holes
the water cycle
DNA replication
plate tectonics
vaccines
entropy
the periodic table
neural networks
natural selection
acids and bases
electromagnetic induction
the greenhouse effect
nuclear fusion
the immune system
gravitational waves
chemical equilibrium
the structure of the atom
antibiotic resistance
osmosis
semiconductors
the Doppler effect
enzymes
Newton's laws of motion
stars and how they die
the carbon cycle
genetic engineering
superconductors
relativity
the nervous system
mitosis and meiosis
surface tension
tides
lightning
earthquakes
volcanoes
solar panels
lithium batteries
the human heart
the digestive system
fermentation
the speed of light
rainbows
refraction
magnetism
radioactive decay
half-life
the pH scale
catalysts
ionic and covalent bonds
oxidation and reduction
viruses and bacteria
stem cells
hormones
the nitrogen cycle
food chains
symbiosis
ocean currents
the seasons
eclipses
comets and asteroids
the Big Bang
dark matter
exoplanets
quantum tunnelling
Heisenberg's uncertainty principle
lasers
transistors
public-key cryptography
hash tables
machine learning
gradient descent
the internet protocol
GPS
wind turbines
jet engines
bridges and the forces in them
heat pumps
the laws of thermodynamics
buoyancy
air pressure
sound waves
the human eye
memory and learning
insulin and diabetes
blood types
Mendelian inheritance
mutations
fossils
soil erosion
crystals
polymers
alloys
nanoparticles
statistics and sampling
probability
prime numbers
the Pythagorean theorem
derivatives and integrals
exponential growth
3D printing
echolocation
hibernation
photosynthetic bacteria
the ozone layer""")
hist = lines("""the French Revolution
the fall of the Roman Empire
the Industrial Revolution
the Silk Road
the Cold War
the Renaissance
the abolition of slavery
the Great Depression
the printing press
the Ottoman Empire
decolonization in Africa
the Enlightenment
the women's suffrage movement
the Black Death
the Meiji Restoration
the Vietnam War
the Bretton Woods system
the Protestant Reformation
the New Deal
ancient Athens
the partition of India
the Treaty of Versailles
the American Civil War
the Russian Revolution
the Mongol Empire
the Spanish conquest of the Aztecs
the Inca Empire
the Han dynasty
ancient Egypt
the Crusades
the Magna Carta
the Hundred Years' War
the Thirty Years' War
the Congress of Vienna
the unification of Germany
the unification of Italy
the First World War
the Second World War
the Marshall Plan
the Cuban Missile Crisis
the fall of the Berlin Wall
apartheid in South Africa
the civil rights movement in the United States
the Haitian Revolution
the Mexican Revolution
the Opium Wars
the Gold Rush in California
the Irish famine
the Viking age
the Byzantine Empire
the Persian Empire
the Peloponnesian War
the invention of writing
the first railways
the space race
the Mughal Empire
the Mali Empire
the Age of Exploration
the Scientific Revolution
the Weimar Republic
the League of Nations
the founding of the European Union
the oil crisis of 1973
the Suez Crisis
the Chinese Cultural Revolution
the Spanish Civil War
the American Revolution
the Hanseatic League
the history of the postal service
the bicycle's arrival in the cities""")
human = lines("""inflation
utilitarianism
supply and demand
the social contract
globalization
cognitive dissonance
free trade
existentialism
monetary policy
the rule of law
opportunity cost
Shakespeare's tragedies
stoicism
the separation of powers
unemployment
confirmation bias
the gross domestic product
modern art
human rights
marketing ethics
behaviourism
democracy
federalism
feminism
liberalism
game theory
the tragedy of the commons
comparative advantage
the placebo effect
the categorical imperative
Plato's allegory of the cave
the problem of evil
free will
virtue ethics
nationalism
secularism
the welfare state
taxation
public goods
monopolies
the business cycle
central banks
bounded rationality
peer pressure
the bystander effect
Maslow's hierarchy of needs
attachment theory
oral tradition
myths and legends
epic poetry
the sonnet
magical realism
Romanticism
Impressionism
the Baroque style
jazz
film editing
propaganda
freedom of the press
constitutional courts
intellectual property
trade unions
migration
urbanization
gentrification
language families
bilingualism
body language
cultural relativism
rhetoric
irony in literature
the unreliable narrator""")
roles = lines("""a wise old sea captain
a strict but kind math teacher
a time traveller from the year 2300
Sherlock Holmes
a chef who owns a small restaurant in Paris
a personal fitness trainer
a friendly dragon
Albert Einstein
a stand-up comedian
a travel agent
a medieval knight
a career counselor
a robot that has just woken up
a football coach before the final
Cleopatra
a grumpy cat
a nutritionist
an astronaut on the Moon
a detective in a film noir
Benjamin Franklin
a poet in love with the sea
a financial adviser
a veterinarian
a bartender who listens to everyone
a lighthouse keeper
a Victorian ghost
a pirate queen
a museum guide
a tired superhero
a beekeeper
Isaac Newton
Jane Austen
Marie Curie
a tour guide in ancient Rome
an airline pilot
a kindergarten teacher
a judge in a cooking contest
a radio host at midnight
a retired spy
a talking tree
a blacksmith in a fantasy village
a hotel receptionist
a job interviewer
a news reporter
a Zen master
a librarian who knows every book
a mechanic with forty years of practice
an alien who visits Earth for the first time
a weather forecaster
a shopkeeper in a small town
a doctor in a village
a tech support agent
a wizard who has lost his wand
a sports commentator
a Shakespearean actor
a philosopher in ancient Athens
a gardener in a royal palace
a train conductor
a startup founder
a museum night guard
a parrot on a ship
a mountain guide
an old fisherman
a fashion designer
a cheerful barista
a science journalist
a chess grandmaster
a violin teacher
a firefighter
a fairy godmother
a lawyer who loves plain words
a penguin
the last dinosaur
Mark Twain
Florence Nightingale
Charles Darwin
a caveman
a king without a kingdom""")
things = lines("""a foldable bicycle
a smart water bottle
a new coffee shop
a language learning app
noise-cancelling headphones
an online bookshop
a solar backpack
a dog walking service
a yoga studio
a robot vacuum cleaner
a children's museum
a vegan restaurant
a mystery novel
a standing desk
a second-hand clothing store
a hiking club
a folding kayak
a ceramic teapot
an electric toothbrush
a podcast about history
a bakery that opens at night
a wireless keyboard
a garden tool subscription
a board game about trains
a camping tent for four
a pottery class
a children's bicycle
a handmade leather wallet
a fitness tracker
a reusable lunch box
a local history tour
an organic shampoo
a wooden toy castle
a barber shop
a phone with a big battery
a cooking class for beginners
a cat café
a jazz festival
a pair of hiking boots
a budget airline
an app that finds lost keys
a bicycle repair shop
a rain jacket
a plant delivery service
a community theatre
a coding camp for girls
a cold brew coffee maker
a weighted blanket
a car sharing company
a memory foam pillow
a book club
a desk lamp that imitates daylight
a bed and breakfast by the sea
a charity run""")
story = lines("""a lighthouse keeper who finds a letter in a bottle
two sisters who inherit a clock shop
a boy who can hear what trees think
the last train of the night
a dog who travels across the country
a village where it never stops raining
an astronaut who gets an unexpected visitor
a librarian who discovers a hidden room
a robot that wants to paint
an old man and his chess partner
a girl who befriends a storm
a thief with a conscience
a painting that changes every night
a market at the end of the world
a violin that nobody can play
a baker who can taste memories
a postman who delivers letters from the future
a town where clocks run backwards
a fox and a hen who become friends
a student who wakes up a day too early
a map that draws itself
a pianist who loses her hearing
a bus driver who never speaks
the first winter on Mars
a grandmother's secret recipe
a whale that sings a different song
a king who wants to be a gardener
twins who were separated at birth
a cat that lives in a bookshop
an umbrella that was left on a train
a detective who is afraid of the dark
a mountain that moves
a girl who collects lost buttons
an island that appears once a year
a soldier who comes home
a mistake that turns out to be lucky
a radio that plays yesterday's news
a snowman who wants to see summer
two strangers in a lift that is stuck
a shy ghost in a noisy house
a river that remembers
a tailor who sews wishes into coats
an inventor whose machine works too well
a lost astronaut and a patient computer
a wedding in a storm
an apprentice who breaks the rules
a goldfish with a plan
a stray dog at a fire station
a photograph with an unknown face
a shepherd who finds a fallen star
a school for young dragons
an old ship's last voyage""")
people = lines("""your boss
a new colleague
a customer whose order is late
your landlord
a professor
an old friend
the city council
your team
a job applicant
a neighbour
my son's teacher
the hotel manager
the human resources department
a supplier
my insurance company
a former classmate
my grandmother
a client
the members of our club
a famous author
the school principal
my doctor
a volunteer
the editor of the local newspaper
my roommate
an investor
our customers
my cousin
the library
the internet provider
a possible business partner
my mentor
the bank""")
occ = lines("""asking for a day off
explaining a delay of the project
inviting them to a meeting next Tuesday
thanking them for their help
asking for feedback on a report
apologizing for a mistake in an invoice
proposing a new idea
complaining politely about noise
announcing a change of plans
asking for a recommendation letter
cancelling an appointment
asking for a refund
congratulating on a success
declining an invitation
confirming a reservation
asking for more time
reporting a broken heater
introducing myself
sharing good news
reminding them of a payment
expressing condolences
asking for a raise
saying goodbye after five years
suggesting a date for lunch
asking for information about prices
describing a lost suitcase
offering help with a move
summarizing what we agreed on
requesting a copy of a contract
asking how they have been
giving notice
explaining why I missed the deadline
welcoming them
asking for advice""")
code = lines("""checks whether a string is a palindrome
computes the factorial of a number
finds the second largest number in a list
sorts a list of dictionaries by a key
counts the vowels in a text
reverses the words of a sentence
merges two dictionaries
removes duplicates from a list and keeps the order
computes the greatest common divisor of two numbers
checks whether two strings are anagrams
reads a CSV file and prints the average of a column
implements binary search
implements a stack with push and pop
implements a queue with two stacks
converts Celsius to Fahrenheit
finds all prime numbers up to n
validates an e-mail address with a regular expression
computes the n-th Fibonacci number with memoization
implements bubble sort
flattens a nested list
finds the longest common prefix of some strings
counts how often each word occurs in a file
rotates a matrix by 90 degrees
computes the depth of a binary tree
implements depth-first search on a graph
implements a simple cache with a maximum size
generates a random password
converts a Roman numeral to an integer
finds the missing number in a list from 1 to n
computes the edit distance of two words
checks whether a number is prime
computes the sum of the digits of a number
finds the longest word in a sentence
counts the lines of a text file
converts a decimal number to binary
converts a binary string to a decimal number
checks whether brackets are balanced
swaps the keys and values of a dictionary
finds the most frequent element of a list
splits a list into chunks of size n
computes the intersection of two lists
computes the transpose of a matrix
multiplies two matrices
implements insertion sort
implements merge sort
implements quicksort
implements a singly linked list with insert and delete
reverses a linked list
detects a cycle in a linked list
implements a binary search tree with insert and search
traverses a binary tree level by level
implements breadth-first search on a grid
finds the shortest path with Dijkstra's algorithm
solves the towers of Hanoi
prints all permutations of a string
prints all subsets of a set
finds two numbers that add up to a target
finds the maximum sum of a contiguous subarray
checks whether a year is a leap year
counts the days between two dates
parses a date such as 2024-05-17
formats a number with thousands separators
capitalizes the first letter of every word
encodes a text with the Caesar cipher
counts the words of a text without punctuation
removes all vowels from a string
compresses a string such as aaabb to a3b2
converts snake_case to camelCase
converts an integer to a Roman numeral
prints a multiplication table
prints FizzBuzz from 1 to 100
simulates rolling two dice
plays rock, paper, scissors with the user
implements a number guessing game
implements a simple calculator
implements a to-do list with add, remove and show
implements a bank account with deposit and withdraw
reads a JSON file and prints one of its fields
writes a list of rows to a CSV file
downloads a web page and prints its title
lists all files of a folder with their sizes
renames all files of a folder
measures how long another function takes
retries another function three times when it fails
implements a decorator that logs calls
yields the Fibonacci numbers as a generator
computes a moving average
computes the standard deviation of a list
finds the median of a list without sorting it twice
checks whether a Sudoku row is valid
checks whether a tic-tac-toe board has a winner
counts the islands in a grid of zeros and ones
computes the power of a number by repeated squaring
computes the least common multiple of two numbers
prints Pascal's triangle
finds all divisors of a number
checks whether a password is strong
masks a credit card number except for the last four digits
extracts all links from an HTML text
groups words by their first letter
sorts words by length and then alphabetically
merges two sorted lists
merges overlapping intervals
schedules meetings without conflicts
implements a priority queue
implements a trie for words
implements a rate limiter
implements an event emitter
converts a temperature table from a file
computes compound interest""")
langs = ["Python"] * 5 + ["JavaScript", "Java", "C++", "C", "Go", "TypeScript", "Ruby"]
names = lines(
    "Anna\nTom\nMaria\nDavid\nSara\nOmar\nLucy\nBen\nPriya\nCarlos\nEmma\nJack\nNina\nPaul\nGrace\nLeo\nYusuf\nHannah\nKofi\nMei\nIsabel\nViktor\nFatima\nRuth\nDiego\nAisha\nPeter\nClara\nRaj\nSofia\nHenry\nLina\nMark\nJulia\nSam\nEllen"
)
goods = lines(
    "apples\npencils\nmarbles\nbooks\ncookies\nstamps\nflowers\nballoons\ntickets\neggs\nbottles of water\nT-shirts\noranges\nshells\ncandles\npostcards\nmuffins\nnotebooks\nstickers\ncups\nlemons\nbatteries\nkeys\nbeads\ncomic books\nplates\nsandwiches\ncoins"
)
sent = lines("""The weather is beautiful today, so we will have lunch in the garden.
I would like to book a table for two people at eight o'clock.
My brother works in a hospital and often comes home late.
Can you tell me where the nearest train station is?
The children were playing in the park when it started to rain.
She has been studying medicine for four years.
Please send me the documents before Friday.
We missed the bus and had to walk home.
The book that you gave me was very interesting.
How much does this shirt cost?
There is a small museum behind the church.
He forgot his keys and had to wait outside.
The film begins at nine, but we should be there earlier.
I have never eaten such good bread.
They are looking for a house with a big kitchen.
Yesterday my cat slept all day on the sofa.
Next summer we want to travel to the mountains.
The doctor told him to drink more water.
I lost my passport somewhere between the hotel and the airport.
The soup is too salty, but the bread is delicious.
Could you please speak a little more slowly?
My parents have been married for thirty years.
If it snows tomorrow, the school will stay closed.
She opened the window because the room was too warm.
We are out of milk and eggs.
Our lesson was put off until Wednesday afternoon.
Turn left at the traffic lights and then go straight ahead.
He speaks four languages, but he cannot cook.
I am allergic to nuts and seafood.
The shop closes at six in the evening.
My phone is broken, so I cannot call you.
They painted the kitchen yellow last weekend.
Where did you learn to dance so well?
The train to the coast leaves from platform five.
This is the best cake that I have ever eaten.
Her sister wants to become a pilot.
You should wear a warm coat today.
The museum is free on the first Sunday of the month.
I have a headache and would like to lie down.
We planted two apple trees behind the house.
Nobody knew the answer to the last question.
The river was so clear that we could see the fish.
What time do you usually get up?
He promised to write, but he never did.
The company is looking for a new accountant.
My neighbour plays the trumpet every evening.
Let's meet in front of the cinema at half past seven.
The bill was higher than we expected.
I would rather stay at home and read.
The bridge was built more than two hundred years ago.
Do you have this jacket in a smaller size?
The baby has finally fallen asleep.
We need three volunteers for the school party.
It was raining so hard that we stopped the car.
The teacher explained the exercise once again.
I forgot to water the plants.
His grandfather used to be a sailor.
There are too many people on this bus.
Thank you very much for your kind letter.
The lights went out in the middle of the concert.
She would have come if you had invited her.
Please take off your shoes before you enter.
The price of vegetables has doubled since spring.
I am not sure whether the shop is open on Sundays.
The two friends have known each other since childhood.
Could I have the menu, please?
The dog is afraid of thunder.
They live on the third floor of an old building.
Everything will look better in the morning.
My suitcase is heavier than yours.
The mayor promised to build more playgrounds.
We watched the sunset from the top of the hill.
He broke his arm while skiing.
Is there a pharmacy near here?
The results of the test will be ready next week.
She sings in a choir and plays the guitar.
I have been waiting for an hour.
The library has more than ten thousand books.
Do not touch the plate, it is very hot.
The new law protects people who rent their homes.
Scientists have discovered a new kind of frog.
The door opened slowly, but nobody came in.
My uncle grows tomatoes on his balcony.
The government plans to lower taxes next year.
We had to wait for the next ferry.
Children under six travel for free.
The wind blew the hat off his head.
I hope that you feel better soon.
Everyone laughed except for the teacher.
Honesty is more important than success.""")
tongues = ["French", "Spanish", "German", "Italian", "Portuguese", "Dutch", "French", "Spanish", "German"]
texts = lines("""The town of Elmsford opened a new bicycle bridge on Saturday. It is 140 metres long and cost 3.2 million dollars, most of which came from a state fund. About two thousand people came to the opening. The mayor said that the bridge will save commuters ten minutes a day, while some residents complained about the lack of parking nearby.
Bees are important for agriculture because they pollinate many crops. In recent years the number of bees has fallen in many countries. Scientists name pesticides, diseases and the loss of wild flowers as the main causes. Farmers can help by planting strips of flowers beside their fields and by using fewer chemicals.
The company Northwind reported sales of 48 million euros for the last quarter, 6 percent more than a year before. Profits fell slightly to 4.1 million euros because of higher energy prices. The chief executive, Laura Meyer, expects stable results for the rest of the year and plans to hire 50 engineers.
Samuel was born in a small fishing village in 1932. He left school at fourteen to work on his uncle's boat. At twenty he moved to the city, learned to repair radios, and opened his own shop. He retired in 1997 and wrote a book about his childhood, which became a local success.
Researchers asked 1,200 adults about their sleep. Those who used a phone in bed slept on average 35 minutes less than the others and felt more tired in the morning. The effect was larger for people under thirty. The authors recommend to leave the phone outside of the bedroom.
The Baltic herring lives in shallow water and grows to about 20 centimetres. It feeds on plankton and is eaten by cod, seals and seabirds. Fishing quotas were lowered in 2021 because stocks had shrunk. Since then the numbers have recovered a little, but only in the northern part of the sea.
Our hotel has 64 rooms on four floors. Breakfast is served from 6:30 to 10:00 in the garden room. Guests can use the pool until 9 in the evening. Parking costs 12 dollars a night. Dogs are welcome, but not in the restaurant. The reception is open day and night.
On Monday the council discussed the new school. Ms. Ortega presented two sites: one near the station, and one beside the river. The first is easier to reach, the second is cheaper by two million. The council voted seven to four for the station, and asked for a traffic study until March.
Concrete is made of cement, sand, gravel and water. Making cement releases a lot of carbon dioxide, about eight percent of the world's emissions. Engineers try to replace part of the cement with ash or clay. Others inject carbon dioxide into fresh concrete, which makes it stronger at the same time.
When the power went out, Julia lit three candles and took out a deck of cards. Her brothers complained about the lost football match, but after an hour they were laughing. When the lights came back at ten, nobody got up to turn on the television.
Tea was first drunk in China as a medicine. Monks brought it to Japan, and Dutch merchants to Europe in the seventeenth century. In Britain it became so popular that its tax paid for a tenth of the state's income. Today India and China grow more than half of the world's tea.
The new laptop weighs 1.2 kilograms and has a 14-inch screen. Its battery lasts eleven hours in our test, two more than its predecessor's. The keyboard is quiet and comfortable. We liked less that it has only two ports, and that the memory cannot be extended. It costs 1,099 dollars.
A fire broke out in a furniture warehouse in the harbour of Calder Bay early on Wednesday. About ninety firefighters needed six hours to put it out. No one was hurt, but residents were asked to keep their windows closed because of the smoke. The owner estimates the damage at 2.5 million dollars. The police believe that a faulty cable was the cause. # What probably caused the fire? # How long did the firefighters need?
The restaurant Olive & Salt has a lovely terrace, and our waiter was attentive from the first minute. The grilled fish was fresh and perfectly seasoned. Sadly the desserts were a disappointment: the tart was dry and the ice cream half melted. We paid 86 euros for two, drinks included. I would come back for the fish, but have my cake elsewhere. # What did the reviewer like? # Would the reviewer return, and why?
Dear Ms. Hall, thank you for your order of 14 May. Unfortunately the blue lamp, number 3381, is not in stock at the moment. We expect a new delivery in about three weeks. You can wait, choose the same lamp in green, or cancel the order and get your money back. Please let us know by the end of the month. Kind regards, Tim Roth, Lumen Home. # What choices does Ms. Hall have? # Which product is not available?
Octopuses have three hearts and blue blood. Two hearts pump blood through the gills, and the third one sends it around the body. Their blood is blue because it carries oxygen with copper rather than iron. Most octopuses live alone and only for one or two years. They can change their colour within a second to hide from sharks and other hunters. # Why is the blood of octopuses blue? # What do the three hearts do?
For the pancakes, mix 200 grams of flour with two eggs, 350 millilitres of milk and a pinch of salt. Let the batter rest for twenty minutes. Heat a little butter in a pan and pour in a ladle of batter. Turn the pancake when its edges become brown. Serve with lemon and sugar, or with cheese and ham. The recipe is enough for four people. # How long should the batter rest? # What can the pancakes be served with?
Minutes of 3 March. Present: Ines, Rob, Tariq, Wen. The new website will go online on 2 April. Rob reported that the payment page still fails on older phones; he will fix it by Friday. Wen asked for a larger budget for photos, which was declined. Tariq will write to all members about the change. The next meeting is on 17 March at ten. # Who has to do what? # When will the new website go online?
Eleanor Marsh was born in Bristol in 1889 as the daughter of a teacher. She studied chemistry although few universities admitted women at the time. In 1921 she developed a cheap dye that did not fade in sunlight, and sold the patent to a textile firm. With the money she founded a school for girls, which she led until her death in 1958. # What did Eleanor Marsh develop? # How did she use the money?
"Have you seen my glasses?" asked Harold. "They are on your head," said Mabel without looking up from her crossword. He laughed and sat down beside her. "Then perhaps you have also seen the tickets for tonight?" Mabel put down her pen. "Harold, the concert was last night." For a while both were silent. Then she began to giggle, and he joined in. # Where were the glasses? # Why can they not go to the concert?
The airline SkyNord will no longer fly from Aberholm to Rome in winter. In a statement the company said that only half of the seats had been sold last year. Passengers who have already booked can get a refund or fly from the capital, 90 kilometres away. The airport's director regretted the decision and said that talks with two other airlines had begun. # Why does the airline stop the flights? # What can passengers do who have booked?
Glaciers are formed where more snow falls in winter than melts in summer. Year after year the layers grow, and their weight presses the lower ones into ice. When the ice is thick enough, it begins to flow slowly downhill, often less than a metre a day. On its way it carries rocks and carves wide valleys. Today most of the world's glaciers are shrinking. # How are glaciers formed? # How fast does the ice flow?
Notice to all tenants: the water will be turned off on Thursday, 9 October, from 8 a.m. to 1 p.m., because the pipes in the cellar have to be replaced. Please fill a bucket the evening before and make sure that all taps are closed. The washing machines can be used again from 3 p.m. For questions call the caretaker, Mr. Lindqvist, on extension 12. # When will the water be turned off? # What should the tenants do before?
The Harbour Museum had 184,000 visitors last year, 12 percent more than the year before. The most popular exhibition was about shipwrecks, seen by 70,000 people. Income from tickets rose to 1.3 million dollars, and the shop earned another 240,000. Costs grew as well, mostly because of a new roof. The museum ended the year with a small surplus of 35,000 dollars. # How many people visited the museum? # Why did the costs grow?
Once a crow found a walnut that it could not crack. It dropped the nut on the grass, but nothing happened. A sparrow watched and said: "Try the road." The crow was too proud to listen and tried the grass again until evening. When it was gone, the sparrow rolled the nut onto the road, waited for a cart, and ate in peace. # What advice did the sparrow give? # What is the moral of the story?
The BrewMate 300 makes up to eight cups of coffee in six minutes. Fill the tank with cold water, place a filter in the basket and add one spoon of coffee for each cup. Press the button once for mild and twice for strong coffee. The plate keeps the pot warm for forty minutes and then turns itself off. Clean the machine with vinegar once a month. # How do I make strong coffee? # How often should the machine be cleaned?
In a study with 640 schoolchildren, half of the classes went outside for fifteen minutes before each maths lesson. After one term these classes made 9 percent fewer mistakes in a test than the others. Teachers also reported that the lessons were calmer. The researchers warn that the study took place in only one city, and that the effect in winter is unknown. # What did the study find? # What limits of the study are mentioned?
The film Paper Harbour tells of a young engineer who returns to her home town to close its shipyard. It starts slowly, and some of the side stories lead nowhere. But the last half hour is gripping, and Dana Okoro is superb in the leading role. The music, played by a single cello, stays in the mind for days. Three and a half stars out of five. # What is the film about? # What are its weaknesses?
Honey keeps for years because it contains very little water and is slightly acidic, so that bacteria cannot grow in it. Bees make it from nectar, which they carry home in a special stomach. In the hive they fan it with their wings until most of the water is gone. A single bee makes only about a twelfth of a teaspoon in its life. # Why does honey keep for years? # How do bees remove the water?
Hi Marta, I'm coming to Leeds on the 21st for a conference and will stay until the 24th. Would you like to have dinner on one of the evenings? I'm free on the 22nd and 23rd. I still remember the Indian place near the canal, is it still open? By the way, I have a new job and lots to tell. Hugs, Joanna # When is Joanna free? # Why is Joanna coming to Leeds?
The city of Varn wants to make its centre free of cars from next summer. Delivery vans may enter until ten in the morning, and taxis at any time. Shop owners fear that customers will stay away. The council points to two nearby cities where sales rose after a similar change. A first trial with three streets will start in April and last for eight weeks. # What do shop owners fear? # Which vehicles may still enter the centre?
Solaris Tools sold 21,400 drills in the first half of the year, compared with 18,900 in the same period last year. Revenue increased by 11 percent to 3.9 million dollars. The company opened a second factory in Ohio and now employs 260 people. Shipping costs doubled, however, and the margin fell from 14 to 12 percent. The board will propose a dividend of 40 cents per share. # How many people work for the company? # Why did the margin fall?
Rules of the reading room: please leave bags and coats in the lockers. Only pencils may be used for notes. Old maps must be ordered one day in advance and may not be copied. Photographs without flash are allowed for private use. Food and drinks are not permitted, except for water in closed bottles. The reading room closes at 7 p.m., on Saturdays at 2 p.m. # What may visitors bring to drink? # When must old maps be ordered?
The sailor Ivo Brandt crossed the Atlantic alone in a boat of only five metres. He left the Canary Islands on 11 January and reached Barbados after 47 days. A storm destroyed his radio in the second week, so nobody knew whether he was alive. He lived on rice, dried fruit and fish. "I missed music most of all," he said on arrival. # How long did the crossing take? # What did the sailor miss most?
Many people believe that we use only ten percent of our brain, but this is a myth. Scans show that nearly all regions are active in the course of a day, even during sleep. The brain makes up two percent of the body's weight and uses about twenty percent of its energy. An organ that was mostly idle would hardly be so expensive. # Which myth is described? # How much energy does the brain use?
The Cedar Valley trail is 14 kilometres long and takes four to five hours. It starts at the parking lot beside the old mill and climbs gently through pine forest. After six kilometres you reach a lake where swimming is allowed. The last part is steep and can be slippery after rain. Bring good shoes, two litres of water and a map, as there is no phone signal. # What should hikers bring? # Where does the trail start?
Support ticket 5520: The customer, Mr. Adeyemi, cannot log in since the update on Monday. He has tried two browsers and reset his password, without success. The error message says that his account is locked. He needs his invoices by tomorrow noon for the tax office. He was promised a call before five o'clock. Priority: high. Assigned to: second level team. # What has the customer already tried? # Why is the case urgent?
Bamboo is a grass, although some kinds grow as tall as a house. In good conditions it can grow almost a metre in a day. It needs neither fertilizer nor replanting, because new shoots rise from the roots. People use it for scaffolding, furniture, paper and cloth. Giant pandas eat up to forty kilos of it a day, since it contains few nutrients. # What is bamboo used for? # Why do pandas eat so much of it?
Football: Redfield beat Ostia Park 3-2 on Sunday in front of 8,200 spectators. Ostia led 2-0 at half-time after goals by Lund and Pereira. After the break Redfield attacked without pause, and Kamara scored three times, the last one in the 89th minute. Ostia's coach called the defeat "a gift that we wrapped ourselves". Redfield is now fourth in the table. # Who scored the goals? # What was the score at half-time?
Johannes wanted to sell his grandfather's piano because it took up half of the living room. A dealer offered him two hundred euros. While they were carrying it down the stairs, a bundle of letters fell out. They had been written by his grandmother in 1944. Johannes read the first one, sent the dealer away, and began to take piano lessons in the autumn. # Why did Johannes want to sell the piano? # What changed his mind?
The common cold is caused by more than two hundred different viruses. It spreads through droplets and over hands. Symptoms start one to three days after infection and usually last for a week. There is no cure, but rest, warm drinks and sleep help. Antibiotics are useless, since they act only against bacteria. Washing the hands often is the best protection. # Why are antibiotics useless against a cold? # How does a cold spread?
Job offer: Greenleaf Bakery in Norwich is looking for a baker for 30 hours a week. You start at 3 a.m. and are free from 9 a.m. on. We offer 16 pounds an hour, five weeks of holiday and free bread. You need two years of practice and should like working in a team. Send your application to Ms. Doyle by 30 June. # What does the bakery offer? # What are the requirements?
Until the nineteenth century every town had its own time, set by the sun. When railways connected the towns, this caused confusion and even accidents. British railway companies therefore began to use London time in the 1840s. In 1884 delegates of 25 countries met in Washington and agreed on a prime meridian through Greenwich. The time zones of today follow from that decision. # Why did local time become a problem? # What was agreed on in 1884?
I bought this vacuum cleaner two months ago. It is light and picks up dog hair without trouble. The battery, which should last for forty minutes, is empty after twenty-five. Customer service answered quickly and sent me a new one, but it is no better. For a small flat it is fine, for a house I would choose another model. # What is the problem with the battery? # For whom is the vacuum cleaner suitable?
The school garden at Hillcrest began with three pots of basil. Today sixty pupils look after twenty beds, a pond and two beehives. In summer they sell vegetables at the weekly market and earn about 900 dollars, which pays for seeds and tools. Last year a group of parents built a greenhouse from old windows. The cook uses tomatoes and herbs for the school lunch. # How did the garden begin? # What happens with the money?
Weather for Friday: the morning starts foggy in the valleys, with sun above 800 metres. In the afternoon clouds move in from the west, and showers are likely in the north after four o'clock. Temperatures reach 11 degrees on the coast and 7 degrees inland. The wind is weak at first and becomes strong in the evening. The weekend stays cool and wet. # Where will it be sunny in the morning? # What will the weekend be like?
Chess probably began in India in the sixth century under the name chaturanga. From there it came to Persia, and with the Arabs to Spain and Italy. In the fifteenth century the queen became the strongest piece, which made the game much faster. The first official world champion was Wilhelm Steinitz in 1886. In 1997 a computer beat the reigning champion for the first time. # Where did chess begin? # How did the game change in the fifteenth century?
The start-up Loop sells rain jackets made from old fishing nets. Its two founders, Ana Ruiz and Per Holm, met on a diving trip in 2018. So far they have recycled eighty tons of nets and sold 32,000 jackets, mostly online. An investor from Denmark has now put in five million euros. With that money Loop wants to open shops in Hamburg and Oslo. # What are the jackets made from? # What will the money be used for?
Mira counted the steps as she went down: forty, forty-one, forty-two. There should have been only forty. She stopped and held up the lamp. In front of her was a green door that she had never seen, and from behind it came the smell of fresh bread. She knocked. "You are late," said a voice that sounded exactly like her own. # What surprised Mira? # Whose voice did it sound like?
Patients who take Norvalin should swallow one tablet in the morning with a glass of water. It must not be taken together with grapefruit juice. Common side effects are tiredness and a dry mouth, which usually disappear after a few days. Do not drive during the first week. If a rash appears, stop taking the tablets and call your doctor. Store below 25 degrees. # What are common side effects? # What should a patient do if a rash appears?
A survey of 2,000 commuters shows that 41 percent drive to work alone, 33 percent use buses or trains, 15 percent cycle and 11 percent walk. Asked what would make them change, most drivers named more frequent buses and lower fares. Only one in ten said that nothing could make them give up the car. Ten years ago 52 percent drove alone. # What would make drivers change? # How has the share of drivers changed?
The Andean condor has a wingspan of up to 3.2 metres and can glide for hours without a single beat of its wings. It feeds on dead animals and thereby keeps the landscape clean. A pair raises only one chick every two years. The birds can become older than fifty. They are threatened by poison and by the loss of their habitat. # What threatens the condor? # Why is the condor useful?
Dear team, the office will be closed from 23 December to 2 January. Please hand in your travel expenses by the 15th, so that they can be paid this year. The cleaning firm asks everyone to empty the fridge. In urgent cases Samira can be reached by phone. Our winter party takes place on the 18th at the bowling alley; partners are welcome. Best, Gordon # When does the party take place? # What should everybody do before the holidays?
Cork is the bark of an oak that grows around the western Mediterranean. It can be harvested for the first time when the tree is about twenty-five years old, and then every nine years, without harming the tree. Portugal produces half of the world's cork. Besides stoppers it is used for floors, shoes and even spacecraft, because it is light and keeps heat out. # How often can cork be harvested? # What is cork used for?
The court in Wexley ordered a phone company to pay back 1.8 million pounds to its customers. For three years the firm had charged a fee of two pounds for paper bills without telling customers before. A pensioner had brought the case with the help of a consumer group. The company can appeal within thirty days. Its shares fell by four percent on Tuesday. # Why must the company pay? # Who brought the case?""")
questions = [
    "What is the main idea of the text?",
    "Which numbers are mentioned, and what do they mean?",
    "Who or what is the text about?",
    "What reasons are given?",
    "What problem is described?",
    "What happened at the end?",
    "What is the most surprising detail?",
    "Which places are mentioned?",
    "What could be the consequences?",
    "Who might have written this, and for whom?",
    "What does the text not tell us?",
    "What would be a good title?",
    "What comes first, and what follows?",
]
foreign = lines("""Il fait froid ce matin, alors je mets mon manteau.
Nous avons mangé au restaurant avec nos voisins.
Ma sœur cherche un appartement près de la gare.
Est-ce que vous avez une chambre pour deux nuits ?
Le chat dort sur la chaise de la cuisine.
Je ne comprends pas pourquoi il est parti si tôt.
Les enfants ont oublié leurs livres à l'école.
Demain, nous irons à la mer si le temps le permet.
Hace mucho calor y no tenemos agua fría.
Mi abuelo trabaja en el jardín todos los días.
¿Puede decirme cuánto cuesta este sombrero?
Ayer perdimos el último autobús a casa.
Quiero aprender a tocar la guitarra este año.
La tienda está cerrada los domingos por la tarde.
Ella vive con dos amigas en el centro de la ciudad.
Si tienes tiempo, llámame después del trabajo.
Der Zug nach München hat zwanzig Minuten Verspätung.
Ich möchte ein Kilo Kartoffeln und sechs Eier.
Meine Tante hat einen kleinen Laden am Marktplatz.
Wir sind gestern erst um Mitternacht nach Hause gekommen.
Können Sie mir bitte das Salz geben?
Das Buch liegt auf dem Tisch neben der Lampe.
Er lernt Englisch, weil er in Kanada arbeiten will.
Im Herbst fallen die Blätter von den Bäumen.
La finestra è aperta e fa freddo in camera.
Vorrei un caffè e un bicchiere d'acqua, per favore.
I miei amici arrivano domani con il treno delle dieci.
Non ho mai visto un film così bello.
Mio fratello gioca a calcio ogni sabato.
Dove posso comprare un biglietto per il museo?
Abbiamo camminato tutto il giorno in montagna.
La torta della nonna è la più buona del paese.
O meu carro está na oficina desde segunda-feira.
Gostaria de reservar uma mesa para quatro pessoas.
Ela lê um livro novo todas as semanas.
A praia fica a dez minutos do hotel.
Você pode me ajudar com esta mala?
Choveu muito ontem e a rua ficou cheia de água.
O meu filho quer ser bombeiro quando crescer.
Não sei onde deixei os meus óculos.
Le médecin m'a conseillé de marcher tous les jours.
Die Kinder spielen im Garten, obwohl es regnet.""")
facts = lines("""Who painted the Mona Lisa?
Who invented the telephone?
Who discovered penicillin?
Who wrote Don Quixote?
Who composed The Four Seasons?
Who was the first person to walk on the Moon?
Who was the first president of the United States?
Who wrote Romeo and Juliet?
Who formulated the theory of relativity?
Who was the first woman to win a Nobel Prize?
Who designed the Eiffel Tower?
Who wrote Frankenstein?
Who sailed around the world first?
Who painted the ceiling of the Sistine Chapel?
Who wrote The Origin of Species?
Who was Julius Caesar's heir?
Who invented the World Wide Web?
Who was the first emperor of China?
Who wrote War and Peace?
Who composed the Ninth Symphony with the Ode to Joy?
Who led India to independence?
Who founded Microsoft?
Who wrote Pride and Prejudice?
Who developed the periodic table?
When did the Second World War end?
When did the Titanic sink?
When did the Berlin Wall fall?
When was the printing press with movable type invented in Europe?
When did the first human fly into space?
When did the French Revolution begin?
When was the Declaration of Independence of the United States signed?
When did the Western Roman Empire end?
When did Columbus reach America?
When was the United Nations founded?
When did the First World War begin?
When were the first modern Olympic Games held?
When was the Great Fire of London?
When did India become independent?
When was the euro introduced as cash?
When did Nelson Mandela become president?
What is the largest planet of the solar system?
What is the smallest country in the world?
What is the longest river in Africa?
What is the highest mountain in the world?
What is the hardest natural material?
What is the largest ocean?
What is the chemical symbol for gold?
What is the chemical formula of table salt?
What is the boiling point of water at sea level?
What is the largest mammal?
What is the fastest land animal?
What is the currency of Japan?
What is the official language of Brazil?
What is the closest star to the Earth?
What is the largest desert on the Earth?
What is the main ingredient of hummus?
What is the freezing point of water in Fahrenheit?
What is the most abundant gas in the air?
What is the largest organ of the human body?
What is the study of fossils called?
What is a group of lions called?
What is the opposite of nocturnal?
What is the square root of 144?
What is the national flower of the Netherlands?
What is the tallest living animal?
What is the deepest lake in the world?
What is the capital of Australia?
Which planet has the most visible rings?
Which gas do plants take in?
Which metal is liquid at room temperature?
Which vitamin does the skin make in sunlight?
Which instrument has 88 keys?
Which ocean lies between Africa and Australia?
Which element has the atomic number 1?
Which blood cells fight infections?
Which country has the most inhabitants?
Which city is called the Eternal City?
Which continent is the driest that people live on?
Which animal sleeps hanging upside down?
Which planet is known as the red planet?
Which organ pumps blood through the body?
Which language has the most native speakers?
Which river flows through Paris?
Which country gave the Statue of Liberty to the United States?
Where is Machu Picchu?
Where were the ancient pyramids of Giza built?
Where do kangaroos live in the wild?
Where is the Great Barrier Reef?
Where was the first subway opened?
Where does cocoa come from?
Where is the Taj Mahal?
Where in the body is insulin made?
Where did the tango come from?
How many bones does an adult have?
How many continents are there?
How many players does a football team have on the field?
How many strings does a violin have?
How many legs does a spider have?
How many sides does a hexagon have?
How many minutes are there in a day?
How many states does the United States have?
How many degrees does a circle have?
How long does the Earth take to go around the Sun?
How far is the Moon from the Earth?
How fast does light travel?
How long does it take light from the Sun to reach the Earth?
Why is the sky blue?
Why do leaves change colour in autumn?
Why does ice float on water?
Why is the sea salty?
Why do we have leap years?
Why do cats purr?""")
countries = lines(
    "Portugal\nCanada\nKenya\nThailand\nArgentina\nPoland\nTurkey\nMorocco\nNorway\nPeru\nSouth Korea\nEgypt\nNew Zealand\nHungary\nIndonesia\nCuba\nGreece\nVietnam\nEthiopia\nChile\nFinland\nPakistan\nMongolia\nIreland\nColombia\nNigeria\nSwitzerland\nJordan\nNepal\nIceland\nBrazil\nAustria"
)
figures = lines("""Marie Curie
Nelson Mandela
Leonardo da Vinci
Ada Lovelace
Mozart
Confucius
Frida Kahlo
Isaac Newton
Rosa Parks
Galileo
Alan Turing
Joan of Arc
Genghis Khan
Florence Nightingale
Johannes Gutenberg
Vincent van Gogh
Simón Bolívar
Hypatia
Nikola Tesla
Charles Darwin
Emily Dickinson
Socrates
Napoleon
Queen Victoria
Martin Luther King
Louis Pasteur
Rembrandt
Marco Polo
Amelia Earhart
Louis Armstrong
Tolstoy
Gandhi
Harriet Tubman
Archimedes
Johann Sebastian Bach
Jules Verne
Wangari Maathai
Charlie Chaplin
Ibn Battuta
Emmy Noether""")
words = lines("""ambiguous
resilience
algorithm
irony
nostalgia
empathy
bureaucracy
metaphor
sustainable
paradox
serendipity
integrity
hypothesis
diplomacy
pragmatic
obsolete
mortgage
deductible
renaissance
biodiversity
entrepreneur
procrastinate
diligent
altruism
meticulous
collateral
inevitable
jargon
satire
hierarchy
sovereignty
placebo
tedious
coherent
reluctant
eloquent
plausible
spontaneous
turbulence
etiquette""")
tips = lines("""better sleep
saving money
a job interview
learning a language
healthy eating on a budget
making new friends
moving to a new city
staying focused
public speaking
growing tomatoes
planning a birthday party
training for a marathon
raising a puppy
packing a suitcase
buying a used car
taking better photos
writing a CV
working with a difficult colleague
keeping houseplants alive
cooking for one person
getting up early
travelling with small children
dealing with stress
remembering names
negotiating a salary
choosing a laptop
renting a first flat
studying mathematics
removing stains
running a meeting
organizing a wardrobe
starting a small business
a first date
camping in the rain
reducing waste in the kitchen
drinking less coffee
staying in touch with old friends
a long flight
teaching a child to read
walking in the mountains""")
dishes = lines("""lentil soup
banana bread
a vegetable curry
pancakes
tomato pasta
chocolate cookies
roasted chicken
a summer salad
potato gratin
fried rice
mushroom risotto
apple pie
bean chili
fish tacos
omelettes
pumpkin soup
hummus
meatballs
lemon cake
oat porridge
stuffed peppers
vegetable lasagne
pizza dough
rice pudding
a chickpea stew
noodle soup""")
plans = lines("""learning Spanish
getting fit
writing a novel
cleaning a house
studying for exams
learning the guitar
saving for a car
a vegetable garden
reading more books
preparing for a 10 km run
launching a newsletter
a family of four on a small budget
moving house
learning Python
a class trip
drawing every day
a wedding with sixty guests
finding a new job
a charity bake sale
renovating a bathroom""")
listed = lines("""fruits that are rich in vitamin C
animals that live in the desert
jobs that do not need a degree
words that rhyme with 'light'
things to take on a picnic
inventions of the twentieth century
games for a rainy day
musical instruments with strings
healthy snacks
European rivers
synonyms of 'happy'
verbs for ways of walking
ideas for a birthday present
famous novels
questions to ask at a job interview
uses of vinegar in the house
habits of good students
dishes without meat
board games for two
ways to save electricity
islands in the Pacific
topics for a school presentation
Olympic sports
trees with edible fruit
names for a cat
programming languages and what they are used for
mathematicians
films for a family evening
exercises without equipment
reasons to learn a second language
types of clouds
hobbies for winter""")
versus = lines("""cats | dogs
tea | coffee
trains | planes
renting a flat | buying a flat
e-books | printed books
a laptop | a tablet
living in a city | living in the country
running | swimming
solar power | wind power
frogs | toads
butter | olive oil
novels | short stories
weather | climate
a virus | a bacterium
Python | Java
Linux | Windows
a credit card | a debit card
a comet | an asteroid
capitalism | socialism
mass | weight
speed | velocity
a lake | a pond
the violin | the viola
football | rugby
mean | median
alligators | crocodiles
a loan | a mortgage
working for a big company | working for a start-up
stocks | bonds
a simile | a metaphor
gas stoves | induction stoves
the Moon | Mars
private schools | public schools
handwritten notes | notes on a computer
supervised learning | unsupervised learning
a compiler | an interpreter""")
broken = lines("""yesterday me and my friend was going to the store for buy some milk but it were closed so we goes home
The informations in this report is very importants and needs to be readed by all employee of company
she dont know nothing about the problem because nobody have told her when it happen
I has lived here since five years and I am liking it very much
Their going to there house because they're car is broke
Me and him goes to the gym every days, but today we was too tired
The childrens has ate all the cake before the guests was arriving
If I would have knew about the party, I will come
Its a shame that the dog lost it's collar in the park
He said me that he don't can come to the meeting on monday
We was waiting since two hours and nobody come to help us
There is many reason why peoples likes to travelling
I am agree with you, but the prices is to high for much people
Last week I buyed a new phone but it not works good
The team have win the match, thanks to they're new coach
She can sings very good and she play also the piano
Every students must to bring his own lunchs on the trip
I look forward to hear from you and thanks for you're help
The manager which we talked yesterday were very friendly
Less people is coming to the shop since the street are closed""")
snippets = lines("""total = 0; for x in [3, 5, 8]: total += x; print(total)
print([i * i for i in range(6) if i % 2 == 0])
def f(n): return 1 if n < 2 else n * f(n - 1)
a = [1, 2, 3]; b = a; b.append(4); print(a)
names.sort(key=lambda name: (len(name), name))
d = {}; d.setdefault('x', []).append(1); print(d)
print("hello"[::-1].upper())
def g(items=[]): items.append(1); return items
with open("data.txt") as file: print(sum(1 for line in file))
x, y = 4, 9; x, y = y, x % 4; print(x, y)
const evens = [1, 2, 3, 4].filter(n => n % 2 === 0);
const total = prices.reduce((sum, p) => sum + p, 0);
for (int i = 0; i < 10; i += 3) printf("%d ", i);
SELECT city, COUNT(*) FROM customers GROUP BY city HAVING COUNT(*) > 5;
SELECT name FROM products ORDER BY price DESC LIMIT 3;
while n != 1: n = n // 2 if n % 2 == 0 else 3 * n + 1
print(sorted(set("mississippi")))
result = any(word.startswith("b") for word in ["apple", "berry"])
grep -c "error" server.log
ls -l | sort -k5 -n | tail -3
def average(xs): return sum(xs) / len(xs) if xs else None
print("even" if len("lantern") % 2 == 0 else "odd")
matrix = [[0] * 3 for _ in range(3)]
try: value = int(text) except ValueError: value = 0""")
bugs = lines("""def mean(xs): return sum(xs) / len(x)
for i in range(len(items)): if items[i + 1] > items[i]: print(i)
def is_even(n): return n % 2 = 0
while i < 10: print(i)
if name is "Anna": print("hello")
def area(r): return 3.14 * r ^ 2
total = "5" + 3
numbers = [1, 2, 3]; print(numbers[3])
def add(a, b): a + b
for (let i = 0; i <= list.length; i++) console.log(list[i].name);
SELECT name, SUM(price) FROM orders;
int *p; *p = 5;
def largest(xs): m = 0; for x in xs: m = max(m, x); return m
print("Sum: " + 4 + 5)
def reverse(s): return s.reverse()
if (x = 5) { printf("five"); }
def fact(n): return n * fact(n - 1)
items = [1, 2, 3, 4]; [items.remove(x) for x in items if x % 2 == 0]""")
chats = lines("""Hi! How are you today?
Hello, what can you do?
Good morning! Tell me something nice.
I'm bored. What could I do this evening?
Tell me a joke about computers.
Tell me a joke about the weather.
I had a terrible day at work.
I just passed my driving test!
What's your favourite season, and why?
Do you like music?
I can't sleep. Any ideas?
Thanks, that was helpful. What else do you know?
Tell me a fun fact about animals.
Tell me a fun fact about food.
I'm nervous about my exam tomorrow.
What would you do with a million dollars?
My best friend is moving away and I feel sad.
Can we talk about films?
Which superpower would you choose?
I want to surprise my wife. Do you have an idea?
It's raining all weekend. Help!
Give me a riddle, but don't tell me the answer yet.
What should I have for dinner?
I've just got a kitten. What should I call it?
Are you a human?
What makes people happy?
I feel lazy today. Motivate me.
Say something encouraging, please.
Do you think robots will ever have feelings?
Tell me a very short bedtime story.""")
num, pick = RANDOM.randint, RANDOM.choice
LENGTHS = [""] * 5 + [
    " Keep it under 100 words.",
    " Use about 200 words.",
    " Use simple language.",
    " Be brief.",
    " Give it a title.",
    " Make it funny.",
    " Use three paragraphs.",
    " End with a question.",
    " Write at least 300 words.",
    " Start with a surprising sentence.",
    " Use the present tense.",
]
STYLES = [""] * 6 + [
    " Be brief.",
    " Use an analogy.",
    " Answer in one paragraph.",
    " Use bullet points.",
    " I'm a beginner.",
    " Use no more than 80 words.",
    " Give a concrete example.",
    " Please go into detail.",
    " Avoid technical terms.",
    " Structure the answer with headings.",
]


def math() -> str:
    n, m, g, k = pick(names), pick(names), pick(goods), num(3, 12)
    a, b = num(20, 60), num(2, 20)
    return pick(
        [
            f"{n} has {a} {g} and buys {b} more. Then {n} gives {num(1, 4)} to each of {num(2, 5)} friends. How many {g} are left?",
            f"A shop sells {g} for ${num(2, 15)} each. How much do {k} of them cost with a discount of {pick([5, 10, 15, 20, 25])}%?",
            f"{n} drives {num(40, 120)} miles in {pick(['1.5', '2', '2.5', '3'])} hours. What is the average speed, and how far does {n} get in {num(4, 8)} hours?",
            f"Solve for x: {num(2, 9)}x + {num(1, 30)} = {num(31, 90)}. Show each step.",
            f"A rectangle is {num(3, 30)} cm long and {num(2, 20)} cm wide. Find its area and perimeter.",
            f"{n} is {num(2, 9)} years older than {m}. The sum of their ages is {num(20, 60)}. How old are they?",
            f"Find the value of f({num(2, 6)}) if f(x) = {num(2, 5)}x^2 - {num(2, 9)}x + {num(1, 12)}.",
            f"A bag contains {num(2, 8)} red, {num(2, 8)} blue and {num(2, 8)} green balls. What is the probability of drawing a blue ball?",
            f"The shorter sides of a right triangle are {pick(['3 and 4', '6 and 8', '5 and 12', '8 and 15', '9 and 12', '7 and 24'])} cm long. How long is the hypotenuse?",
            f"Compute the mean and the median of {', '.join(str(num(1, 40)) for _ in range(num(5, 8)))}.",
            f"If {k} workers paint a house in {num(4, 14)} days, how long do {k * 2} workers need?",
            f"How many integers between {num(1, 20)} and {num(60, 200)} are divisible by {num(3, 9)}?",
            f"{n} saves ${num(10, 80)} every week. After how many weeks has {n} saved ${num(300, 2000)}?",
            f"Solve the system of equations: x + y = {num(8, 30)} and x - y = {num(1, 7)}.",
            f"Two dice are thrown. What is the probability that the sum is {num(3, 11)}?",
            f"In how many ways can {num(3, 7)} people stand in a line?",
            f"A circle has a radius of {num(2, 25)} cm. What are its circumference and its area?",
            f"Factor the polynomial x^2 + {b + k}x + {b * k}.",
            f"{n} puts ${num(2, 50) * 100} into a savings account with {num(2, 6)}% interest a year. How much is it after {num(2, 6)} years?",
            f"A train leaves at {num(6, 11)}:{pick(['05', '15', '20', '40', '50'])} and arrives {num(2, 5)} hours and {num(10, 55)} minutes later. When does it arrive?",
            f"Find the derivative of f(x) = {num(2, 6)}x^3 + {num(2, 9)}x^2 - {num(1, 20)}.",
            f"What is the remainder when {num(50, 400)} is divided by {num(6, 13)}?",
            f"Is {num(50, 200) * 2 + 1} a prime number? Explain how you know.",
            f"{n} cooks {num(2, 6) * 50} grams of rice for {num(2, 4)} guests. How many grams would {num(5, 12)} guests need?",
            f"{n} reads {num(10, 40)} pages a day. {m} reads {num(5, 15)} pages more. How many pages have they read together after {k} days?",
            f"A box has the edges {num(2, 12)}, {num(2, 12)} and {num(2, 12)} cm. What is its volume?",
            f"The price of a coat rises from ${num(4, 9) * 10} to ${num(10, 18) * 10}. By how many percent does it rise?",
        ]
    )


def arithmetic() -> str:
    a, b, c = num(45, 990), num(3, 99), num(2, 40)
    sums = f"{a} {pick('+-*')} {b}"
    return pick(
        [
            f"What is {sums}?",
            f"Calculate {sums} {pick('+-')} {c}.",
            f"{sums} = ?",
            f"Compute ({a} {pick('+-')} {b}) * {c} step by step.",
            f"What is {b * c} divided by {b}?",
            f"What is {pick([5, 8, 12, 15, 20, 25, 30, 35, 40, 60, 75])}% of {a}?{pick(['', ' Explain how you found it.'])}",
            f"Convert {b} {pick(['miles to kilometres', 'inches to centimetres', 'pounds to kilograms', 'degrees Celsius to Fahrenheit', 'degrees Fahrenheit to Celsius', 'gallons to litres', 'hours to minutes', 'days to hours', 'feet to metres', 'kilograms to grams'])}.",
            f"{pick(names)} had {a} {pick(goods)} and lost {c}. How many are left?",
            f"How many minutes are {c} hours and {num(1, 59)} minutes?",
            f"Add these numbers: {', '.join(str(num(1, 99)) for _ in range(num(3, 6)))}.",
            f"A ticket costs ${c}. How much do {b} tickets cost?",
            f"{c * num(3, 20)} {pick(goods)} are shared by {num(3, 9)} children. How many does each get, and how many remain?",
            f"Write {num(1, 9)}/{num(10, 20)} as a decimal number and as a percentage.",
            f"Round {num(1, 99)}.{num(101, 999)} to one decimal place.",
            f"Which is larger: {num(1, 9)}/{num(10, 15)} or {num(1, 9)}/{num(16, 25)}?",
            f"What is {num(2, 20)} squared plus {num(2, 12)} squared?",
            f"The bill is ${b}.{pick(['20', '50', '80'])} and I want to tip {pick([10, 15, 18, 20])}%. What do I pay in total?",
            f"Count from {c} to {c + num(5, 9) * 3} in steps of three.",
            f"Order these numbers from small to large: {', '.join(str(num(1, 500)) for _ in range(num(4, 8)))}.",
        ]
    )


def reason() -> str:
    n, m, o = RANDOM.sample(names, 3)
    cows, hens = num(3, 18), num(3, 18)
    day = pick(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"])
    return pick(
        [
            f"{n} is taller than {m}. {m} is taller than {o}. Who is the shortest? Explain.",
            "All roses are flowers. Some flowers fade quickly. Can we conclude that some roses fade quickly? Explain your reasoning.",
            f"{n} sits left of {m}, and {o} sits right of {m}. Who sits in the middle?",
            f"{n}'s mother has three children: two are called {m} and {o}. What is the third child's name?",
            f"If it takes {num(2, 9)} minutes to boil one egg, how long does it take to boil {num(2, 9)} eggs in the same pot? Why?",
            f"Which word does not belong: {pick(['apple, banana, carrot, cherry', 'car, bus, bicycle, tree', 'piano, violin, hammer, flute', 'lion, tiger, eagle, wolf', 'oak, pine, rose, birch', 'nurse, doctor, surgeon, plumber', 'red, green, square, blue', 'Paris, Rome, Texas, Madrid', 'shirt, shoe, spoon, scarf'])}? Explain why.",
            f"A farmer has {cows + hens} animals, chickens and cows, with {4 * cows + 2 * hens} legs together. How many are there of each?",
            f"What is the next number in the series {pick(['2, 4, 8, 16', '1, 1, 2, 3, 5, 8', '3, 6, 9, 12', '1, 4, 9, 16, 25', '100, 90, 81, 73', '2, 3, 5, 7, 11', '81, 27, 9, 3', '1, 3, 7, 15, 31', '5, 10, 20, 40', '2, 6, 12, 20, 30'])}? Explain the rule.",
            f"Is the following argument valid? {pick(['If it rains, the street gets wet. The street is wet. Therefore it has rained.', 'All birds have wings. A bat has wings. So a bat is a bird.', 'Every member paid the fee. Lena did not pay. So Lena is not a member.', 'Nobody in my family smokes, so smoking is rare.', 'No fish can fly. A trout is a fish. So a trout cannot fly.'])}",
            f"You have a {num(3, 9)}-litre jug and a {num(10, 15)}-litre jug. How can you measure different amounts of water with them?",
            f"If today is {day}, what day will it be in {num(8, 60)} days?",
            f"{n} is the father or mother of {m}, and {m} is a cousin of {o}. How are {n} and {o} related?",
            f"{n}, {m} and {o} finished a race. {n} was not first, {m} was last. In which order did they arrive?",
            f"{n} says: 'I always lie.' Can that be true? Explain.",
            f"One of three boxes contains {pick(goods)}. All labels are wrong. {n} may open one box. How can {n} find out what is where?",
            f"{n} walks {num(2, 9)} steps north, {num(2, 9)} steps east and {num(2, 9)} steps south. Where is {n} now, seen from the start?",
            f"{pick(['Hand is to glove as foot is to what?', 'Bird is to nest as bee is to what?', 'Book is to read as song is to what?', 'Day is to night as summer is to what?', 'Painter is to brush as writer is to what?'])} Explain the relation.",
            f"{n} left the house with an umbrella and came back with wet hair. Give three possible explanations.",
            f"What would happen if {pick(['the Earth stopped turning', 'nobody needed sleep', 'all insects disappeared', 'money did not exist', 'people could read thoughts', 'the oceans rose by ten metres', 'everyone spoke the same language', 'cars could fly'])}? Think step by step.",
            f"{n} has more {pick(goods)} than {m}, and {o} has fewer than {m}. Who has the most? Answer with one name and one sentence.",
        ]
    )


def writing() -> str:
    t, p, s = pick(topics), pick(places), pick(story)
    if RANDOM.random() < 0.3:
        return pick(
            [
                f"Write a {pick(['haiku', 'limerick', 'rhyming poem of four lines', 'song with a chorus', 'free verse poem'])} about {pick([t, p, s])}.",
                f"Give me {num(5, 12)} creative names for {pick(things)} and explain each.",
                f"Write the first paragraph of a novel about {s}.",
                f"i need a quick text message to {pick(people)}, {pick(occ)}",
                f"Write {num(3, 5)} slogans for {pick(things)}.",
                f"Write a social media post about {pick([t, p, pick(things)])} with three hashtags.",
                f"Suggest an outline for an essay about {t}.",
                f"Write a postcard from {p}.",
                f"Invent a surprising ending for a story about {s}.",
            ]
        )
    return pick(
        [
            f"Write a blog post about a weekend trip to {p}, with tips for food and sights.",
            f"Write a short story about {s}.",
            f"Tell me a story about {s}.",
            f"Write a persuasive essay about {t}, with an introduction, arguments and a conclusion.",
            f"Draft an email to {pick(people)}, {pick(occ)}.",
            f"Write a product description for {pick(things)}.",
            f"Write a poem about {pick([t, p, s])}.",
            f"Compose a speech of two minutes about {t}.",
            f"Write a balanced article on the advantages and disadvantages of {t}.",
            f"Write a letter to {pick(people)}, {pick(occ)}.",
            f"Describe a busy market on a trip to {p} so that the reader can smell and hear it.",
            f"Write a dialogue between {pick(roles)} and {pick(roles)} about {t}.",
            f"Write an advertisement for {pick(things)}.",
            f"Write a customer review of {pick(things)}, {pick(['very happy', 'disappointed', 'with mixed feelings', 'ironic'])} in tone.",
            f"Write a diary entry of {pick(roles)}.",
            f"Write a press release about {pick(things)}.",
            f"Write a scene for the theatre about {s}.",
            f"Write a fairy tale in which {pick(roles)} meets {pick(roles)}.",
        ]
    ) + pick(LENGTHS)


def roleplay() -> str:
    r, t = pick(roles), pick(topics)
    return pick(
        [
            f"Pretend to be {r}. Introduce yourself and tell me about your day.",
            f"You are {r}. What is your opinion about {t}?",
            f"Act as {r} and give me advice: {pick(['I cannot decide whether to change my job', 'I had a quarrel with my sister', 'I am afraid of flying', 'I never finish what I begin', 'I spend too much money', 'I feel lonely in a new town'])}.",
            f"Imagine you are {r}. Explain {pick(science)} in your own way.",
            f"Take the role of {r}. I am a customer who is not satisfied. How do you answer?",
            f"Speak like {r} and describe {pick(places)}.",
            f"Let's play a game: you are {r}, I am {pick(roles)}. You begin.",
            f"As {r}, tell me about the strangest thing that ever happened to you.",
            f"Answer as {r} would: {pick(['what is courage?', 'how do I become happy?', 'what do you fear?', 'what would you change in the world?', 'who was your best friend?', 'what is your secret?'])}",
            f"You're {r}. Write a short letter to {pick(roles)}.",
            f"Pretend to be {r} who gives a lecture about {pick(hist + human)}.",
            f"Stay in the role of {r}: what do you think of {pick(things)}?",
            f"Be {r} for a moment and recommend me a book, a dish and a place.",
            f"Interview {r} about {t}. Write three questions and the answers.",
        ]
    )


def coding() -> str:
    task, lang = pick(code), pick(langs)
    return pick(
        [
            f"Write a {lang} function that {task}.",
            f"Write a {lang} program that {task}, with comments.",
            f"Implement in {lang} a function that {task}. Then explain its time complexity.",
            f"Write a {lang} function that {task} and show how to test it.",
            f"I need {lang} code that {task}. Only code, please.",
            f"how do i write code that {task} in {lang}?",
            f"Explain step by step how a {lang} function that {task} can be written, then give the code.",
            f"Write pseudocode for a program that {task}.",
            f"Write unit tests for a Python function that {task}.",
            f"Show two different ways to write a {lang} function that {task}, and compare them.",
            f"Give me a {lang} class with a method that {task}.",
            f"Which edge cases should I consider in a function that {task}?",
            f"What does this code do?\n\n{pick(snippets)}",
            f"Explain this code to a beginner: {pick(snippets)}",
            f"Rewrite this code so that it is easier to read:\n\n{pick(snippets)}",
            f"What is wrong with this code?\n\n{pick(bugs)}",
            f"My code doesn't work. Find the bug and correct it: {pick(bugs)}",
            f"What is the difference between {pick(['a list and a tuple in Python', 'an array and a linked list', 'TCP and UDP', 'a process and a thread', 'SQL and NoSQL databases', 'git merge and git rebase', 'let and var in JavaScript', 'a class and an object', 'recursion and iteration', 'a stack and a queue', 'GET and POST', 'HTTP and HTTPS', 'an interface and an abstract class in Java', 'shallow and deep copies', 'unit tests and integration tests'])}? Give an example.",
            f"Write a web page in HTML with {pick(['a button that changes the colour of the background', 'a list of three links', 'a table of five countries and their capitals', 'a form for a newsletter', 'a clock that shows the time', 'a picture gallery', 'a menu at the top', 'a calculator for tips', 'a contact form with validation'])}.",
            f"Write an SQL query that {pick(['lists the ten best customers by sales', 'counts the orders of each month', 'finds employees who earn more than the average', 'joins students with their courses', 'deletes rows that are older than a year', 'finds duplicate e-mail addresses', 'shows products that were never sold', 'adds a column for the date of birth'])}.",
            f"Write a shell command that {pick(['finds all files larger than 100 MB', 'counts the lines of all Python files', 'renames .txt files to .md', 'shows the five largest folders', 'replaces a word in a file', 'lists running processes by memory'])}, and explain it.",
            f"Explain {pick(['unit testing', 'version control', 'object-oriented programming', 'recursion', 'regular expressions', 'exceptions in Python', 'pointers in C', 'REST APIs', 'asynchronous code in JavaScript', 'database indexes', 'Docker containers', 'big O notation', 'type hints in Python', 'continuous integration'])} with a small example.",
        ]
    )


def passage() -> tuple[str, str]:
    """A text, and a question about it."""
    text, *own = pick(texts).split(" # ")
    return text, pick(own * 3 + questions)


def extraction() -> str:
    text, question = passage()
    if RANDOM.random() < 0.3:
        rows = [f"{pick(names)}, {num(18, 70)}, {pick(countries)}" for _ in range(num(3, 6))]
        return (
            pick(
                [
                    "Convert these lines (name, age, country) to JSON:",
                    "Make a table in Markdown of these people with name, age and country:",
                    "Who is the oldest person in this list, and where does this person live?",
                    "Sort these entries by age and give them back as CSV with a header:",
                    "Which countries occur in this data? Return a list in alphabetical order.",
                ]
            )
            + "\n\n"
            + "\n".join(rows)
        )
    task = pick(
        [
            "Extract all numbers from the following text and say what each one means, as JSON.",
            "List the people, places and organizations in this text.",
            f"Read the text and answer: {question}",
            "Turn the following text into a table with the columns 'fact' and 'detail'.",
            "Classify the tone of the following text as positive, negative or neutral and explain why.",
            "Write five questions and answers about this passage.",
            "Extract all dates and times from the text. Answer 'none' if there are none.",
            "Return a JSON object with the keys 'topic', 'people' and 'numbers' for this text.",
            "List the five most important keywords of the text, separated by commas.",
            "Which sentences of this text are facts, and which are opinions?",
            "Find all adjectives in the text.",
            "Which category fits best: news, story, science, business, letter or manual? Give a reason.",
            "Put the events of the text in order as a numbered list.",
            "Rate the text from 1 to 5 for how positive it is. Return only the number.",
            "Write the facts of this text as CSV lines of the form subject,property,value.",
        ]
    )
    return pick([f"{task}\n\n{text}", f"{text}\n\n{task}"])


def summarise() -> str:
    text = passage()[0]
    task = pick(
        [
            "Sum this text up in two sentences.",
            "Summarize this text in a short paragraph.",
            "What are the key points of this text?",
            "Give a brief summary of the passage below.",
            "Summarize this article as three bullet points.",
            "Explain this text to a child.",
            "Write a headline and a one-sentence summary for this text.",
            "Summarize this in exactly one sentence.",
            "tl;dr?",
            "Shorten the text to about 30 words.",
            "Summarize the text for a busy manager.",
            "Sum up the text in your own words.",
            "What is the most important message of this text?",
            "Make a short social media post out of this text.",
            "Summarize the text, leaving out all numbers.",
            "Give me the gist in no more than 20 words.",
            "Suggest three titles for this text.",
            "Write a summary in a formal tone.",
        ]
    )
    return pick([f"{task}\n\n{text}", f"{text}\n\n{task}", f'{task} "{text}"'])


def answer() -> str:
    text, question = passage()
    how = pick(
        [
            "Answer the question using the text below.",
            "Use only the passage to answer.",
            "Read the passage, then answer the question.",
            "Give a short answer based on the text.",
            "Answer in a full sentence.",
            "Quote the sentence that answers the question.",
            "If the text does not say it, answer 'unknown'.",
        ]
    )
    return pick(
        [
            f"{how}\n\nText: {text}\n\nQuestion: {question}",
            f"{text}\n\n{question}",
            f"{question}\n\n{text}",
            f"Context: {text}\n\nQuestion: {question}\nAnswer:",
            f"{how}\n\n{text}\n\n{question}",
        ]
    )


def factual() -> str:
    fact, where = pick(facts), pick(countries)
    return pick(
        [
            fact,
            f"{fact} Answer in one sentence.",
            f"{fact} Tell me a little more about it, too.",
            f"Quick question: {fact[0].lower()}{fact[1:]}",
            f"For a quiz: {fact[0].lower()}{fact[1:]} And how sure are you?",
            f"What is the capital of {where}?",
            f"Which languages are spoken in {where}?",
            f"On which continent is {where}, and what are its neighbours?",
            f"What is {where} famous for?",
            f"Name three cities in {where}.",
            f"Who was {pick(figures)}?",
            f"Who was {pick(figures)}, and why is this person remembered?",
            f"When and where was {pick(figures)} born?",
            f"Give me five facts about {pick([where, *figures])}.",
            f"Write a short biography of {pick(figures)}.",
            f"True or false: {pick(['spiders are insects', 'the Sun is a star', 'bats are blind', 'sound travels faster than light', 'tomatoes are fruits', 'gold is heavier than iron', 'sharks are mammals', 'Venus is hotter than Mercury', 'glass is made from sand', 'penguins live at the North Pole', 'the heart is a muscle', 'lightning never strikes twice'])}? Explain.",
        ]
    )


def stem() -> str:
    s = pick(science)
    if RANDOM.random() < 0.3:
        return pick(
            [
                f"explain {s} like i'm five",
                f"Explain {s} in three sentences.",
                f"Write five quiz questions about {s}, with answers.",
                f"What are open questions about {s}?",
                f"Make a glossary of six terms that have to do with {s}.",
            ]
        )
    return pick(
        [
            f"Explain {s} to a high school student.",
            f"What should everyone know about {s}?",
            f"Describe the basic ideas behind {s}, step by step.",
            f"What are common misconceptions about {s}?",
            f"Give an overview of {s} with two examples from everyday life.",
            f"How would you design an experiment about {s}?",
            f"What is the relation between {s} and {pick(science)}?",
            f"Why do scientists study {s}? Name three applications.",
            f"How did scientists find out about {s}?",
            f"Help me understand {s}. Start with the basics.",
            f"What mistakes do students make in exams about {s}?",
        ]
    ) + pick(STYLES)


def humanities() -> str:
    h, e = pick(hist + human), pick(hist)
    if RANDOM.random() < 0.3:
        return pick(
            [
                f"Write a lesson plan for teaching {h} to teenagers.",
                f"Make a timeline of {e} with at least five dates.",
                f"Give a short introduction to {h}.",
                f"Write three exam questions about {h} and sketch good answers.",
                f"what's {pick(human)} about? short answer please",
            ]
        )
    return pick(
        [
            f"What were the main causes and effects of {e}?",
            f"Explain {pick(human)} with examples.",
            f"Compare {e} and {pick(hist)}.",
            f"Discuss the importance of {h} for today's world.",
            f"Tell me about {h}, and name some key figures.",
            f"How did {e} change the lives of ordinary people?",
            f"How do scholars disagree about {h}?",
            f"Which books or sources would you recommend about {h}, and why?",
            f"How would a critic describe {pick(human)}?",
            f"What can we learn from {e}?",
        ]
    ) + pick(STYLES)


def translate() -> str:
    s, t, f = pick(sent), pick(tongues), pick(foreign)
    return pick(
        [
            f"Translate into {t}: {s}",
            f'How do you say in {t}: "{s}"',
            f"Translate the following sentence into {t} and explain the grammar: {s}",
            f"Translate to {t}: {s} {pick(sent)}",
            f"{s}\n\nTranslate this into {t}.",
            f"Please translate this sentence to {t} and to {pick(['Swedish', 'Polish', 'Latin'])}: {s}",
            f"What is '{pick(['good morning', 'thank you very much', 'see you tomorrow', 'I am hungry', 'where is the station', 'how much is it', 'happy birthday', 'excuse me', 'good luck', 'the house', 'the bread', 'water', 'my friend'])}' in {t}?",
            f"Translate into English: {f}",
            f"Translate this sentence into English, and explain difficult words: {f}",
            f'What does this mean in English? "{f}"',
            f"Which language is this, and what does it mean: {f}",
            f"{f}\n\nIn English, please.",
            f"Translate to English: {f} {pick(foreign)}",
        ]
    )


def rewrite() -> str:
    s, b = pick(sent), pick(broken)
    return pick(
        [
            f"Edit the following text for grammar and style: {b}.",
            f"Correct the mistakes: {b}",
            f"Is this sentence correct? If not, correct it and explain the mistakes. {b}",
            f"Paraphrase this sentence: {s}",
            f"Give three different ways to say: {s}",
            f"Rewrite in a more {pick(['formal', 'casual', 'dramatic', 'poetic', 'polite', 'humorous'])} style: {s}",
            f"Put this sentence into the {pick(['past tense', 'future tense', 'negative form', 'form of a question'])}: {s}",
            f"Find the nouns and verbs in this sentence: {s}",
            f"Continue the story in five sentences: {s}",
            f"Rewrite this text in {pick(['simple words', 'the first person', 'a funny way', 'the style of a news report', 'the style of a fairy tale', 'half the length'])}:\n\n{passage()[0]}",
            f"Replace as many words as you can by synonyms: {s}",
            f"Make one sentence of these two: {s} {pick(sent)}",
            f"Write a reply to someone who says: {s}",
            f"What is the subject of this sentence, and what is the object? {s}",
        ]
    )


def enumerate_things() -> str:
    what, (one, two) = pick(listed), pick(versus).split(" | ")
    return pick(
        [
            f"List {num(4, 10)} {what}.",
            f"Give me a list of {num(4, 8)} {what}, with one sentence for each.",
            f"Name {num(3, 6)} {what} as a JSON array.",
            f"Make a table of {num(4, 6)} {what}, with a short comment in the second column.",
            f"Brainstorm {what}. Which one is the best, and why?",
            f"Compare {one} and {two}.",
            f"{one[0].upper()}{one[1:]} or {two}: which do you prefer, and why?",
            f"What is the difference between {one} and {two}?",
            f"Make a table that compares {one} and {two}.",
            f"Name two things that {one} and {two} have in common and two in which they differ.",
            f"Help me choose between {one} and {two}.",
        ]
    )


def define() -> str:
    w = pick(words)
    return pick(
        [
            f"What does the word '{w}' mean?",
            f"Define '{w}' and use it in a sentence.",
            f"Give synonyms and antonyms of '{w}'.",
            f"Explain the word '{w}' to a child.",
            f"Where does the word '{w}' come from?",
            f"What is the difference between '{w}' and '{pick(words)}'?",
            f"Write a sentence that contains both '{w}' and '{pick(words)}'.",
            f"What does the saying '{pick(['break the ice', 'once in a blue moon', 'a piece of cake', 'spill the beans', 'the early bird catches the worm', 'actions speak louder than words', 'better late than never', 'bite the bullet', 'hit the nail on the head', 'under the weather', 'let the cat out of the bag', 'too many cooks spoil the broth', 'every cloud has a silver lining', 'burn the midnight oil'])}' mean?{pick(['', ' Give an example.', ' When do people use it?'])}",
        ]
    )


def life() -> str:
    t, tip, dish = pick(topics), pick(tips), pick(dishes)
    return pick(
        [
            f"What are some tips for {tip}?",
            f"Give me {num(3, 8)} tips for {tip}, each in one sentence.",
            f"I need help with {tip}. Where do I begin?",
            f"Which mistakes should I avoid when it comes to {tip}?",
            f"What should I know before I visit {pick(places)}?",
            f"Plan a trip of {num(2, 10)} days to {pick(places)} for {pick(['a couple', 'a family with two kids', 'a student', 'three friends', 'my parents'])}.",
            f"What food should I try when I visit {pick(places)}?",
            f"Explain the pros and cons of {t}.",
            f"What do you think about {t}?",
            f"What has changed about {t} over the last fifty years?",
            f"Give me a recipe for {dish}.",
            f"What ingredients do I need for {dish}? Just the shopping list.",
            f"How can I make {dish} for {num(2, 10)} people {pick(['without dairy', 'in half an hour', 'on a small budget', 'without an oven', 'a bit spicier', 'for children'])}?",
            f"Make a {pick(['weekly', 'daily', 'monthly'])} plan for {pick(plans)}.",
            f"Write a checklist for {pick(plans)}.",
            f"How much time should I set aside for {pick(plans)}?",
            pick(chats),
            f"{pick(['Hey', 'Hi', 'Hello', 'Good evening'])}! Let's chat about {t}.",
        ]
    )


kinds = [
    *[writing] * 4,
    *[roleplay] * 3,
    *[reason] * 2,
    *[math] * 3,
    *[arithmetic] * 3,
    *[coding] * 4,
    *[extraction] * 3,
    *[stem] * 3,
    *[humanities] * 3,
    *[summarise] * 3,
    *[answer] * 3,
    *[factual] * 2,
    *[translate] * 3,
    *[rewrite] * 2,
    *[enumerate_things] * 2,
    define,
    *[life] * 3,
]
more = lines("""Can you make it shorter?
Now explain it to a five-year-old.
Give me an example.
Why is that so?
Rewrite your answer as a list of bullet points.
What would be a counterargument?
Can you give more detail on the most important point?
Are you sure? Please check your answer.
Now do the same in a more formal tone.
What should I do next?
Thanks! Can you say it in one sentence?
Make it twice as long.
Put that into a table.
Give me three more.
How do you know that?
Rewrite that so that it rhymes.
What did you leave out?
Can you explain the first part again?
Translate your answer into Spanish.
Now write it as a letter.
I don't understand. Could you use simpler words?
What is the weakest point of your answer?
Give your answer as JSON.
Give me an alternative.
Summarize what you have said.
Which of these is the most important?
Show every step.
Please use fewer adjectives.
What would an expert add?
Could you make it funnier?
Number your points.
Continue.
ok and what else?
Is there an exception?
Turn it into a dialogue.
Ask me a question about it.
Make it sound more friendly.
What happens if I do the opposite?
Write a title for it.
How could this be checked?
Say it without technical terms.
Repeat only the main result.""")


def conversations(count: int) -> list[list[str]]:
    """``count`` times four user turns; the first ones go through all kinds."""
    RANDOM.seed(SEED)
    seen: set[str] = set()
    found = []
    for i in range(count):
        turns: list[str] = []
        for j in range(4):
            for attempt in range(40):
                if j == 1 and RANDOM.random() < 0.35:
                    turn = pick(more)
                else:
                    turn = kinds[i % len(kinds)]() if j == 0 and attempt < 20 else pick(kinds)()
                if turn in more or turn not in seen:
                    break
            seen.add(turn)
            turns.append(turn)
        found.append(turns)
    return found


if __name__ == "__main__":
    for turns in conversations(int(sys.argv[1]) if len(sys.argv) > 1 else 5000):
        print(json.dumps({"turns": turns}))
